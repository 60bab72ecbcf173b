"""Models made from other models: upcycled, pruned, or the student of a teacher."""
