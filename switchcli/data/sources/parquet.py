"""Rows of Parquet files: of the row groups that begin in a range of bytes, the needed columns alone, some at a time."""

from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from itertools import repeat
from typing import TYPE_CHECKING, Any

from switchcli.data.sources.lines import ByteRange, decode
from switchcli.data.sources.records import RawRow

if TYPE_CHECKING:
    from pyarrow import Array
    from pyarrow.parquet import FileMetaData

_ROWS_AT_ONCE = 256
_BUFFER_BYTES = 2**20


def rows(span: ByteRange, columns: Sequence[str]) -> Iterator[RawRow]:
    """Rows with these columns; where one is missing, all have their names, but what is not needed the value None.

    Named by their number in the file, from 1. Raises DataError for a file that is no Parquet.
    """
    from pyarrow.parquet import ParquetFile

    with span.file.open() as file:
        # Read through a buffer, not a column of a row group at once, which may be gigabytes.
        table = ParquetFile(file, buffer_size=_BUFFER_BYTES, pre_buffer=False)
        present = table.schema_arrow.names
        needed = [name for name in present if name in columns]
        others = {} if set(columns) <= set(present) else dict.fromkeys(present)
        number = 0
        for group in range(table.num_row_groups):
            if not span.holds(_begin(table.metadata, group)):
                number += table.metadata.row_group(group).num_rows
                continue
            for batch in table.iter_batches(_ROWS_AT_ONCE, [group], needed, use_threads=False):
                values = zip(*map(_values, batch.columns), strict=True) if needed else repeat((), batch.num_rows)
                for found in values:
                    number += 1
                    name = f"{span.file.name}:{number}"
                    fields = others | dict(zip(batch.schema.names, found, strict=True))
                    yield RawRow(name, partial(str, name), partial(_decoded, fields))


def _begin(metadata: "FileMetaData", group: int) -> int:
    """Where a row group begins in the file; the rule of who reads it, so that any number does that is in order."""
    column = metadata.row_group(group).column(0)
    return int(column.dictionary_page_offset if column.has_dictionary_page else column.data_page_offset)


def _values(column: "Array") -> list[Any]:
    """Text as bytes: what is not UTF-8 is told row by row, as for other files."""
    import pyarrow as pa

    if pa.types.is_dictionary(column.type):
        column = column.dictionary_decode()
    is_text = pa.types.is_string(column.type) or pa.types.is_large_string(column.type)
    return (column.cast(pa.large_binary()) if is_text else column).to_pylist()


def _decoded(fields: Mapping[str, object]) -> Mapping[str, object]:
    return {name: decode(value) if isinstance(value, bytes) else value for name, value in fields.items()}
