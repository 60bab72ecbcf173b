"""stub"""

from collections import Counter
from collections.abc import Iterable, Iterator

from switchcli.data.document import Document
from switchcli.spec import Spec


class Filters(Spec):
    """stub"""

    def __call__(self, documents: Iterable[Document], dropped: Counter[str]) -> Iterator[Document]:
        yield from documents
