"""Models made from other models: upcycled, pruned, or a student initialized from its teacher."""
