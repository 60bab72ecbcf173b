"""Rows of Parquet files: those of the row groups that begin in a byte range, only the needed columns, in batches."""

from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from itertools import repeat
from typing import TYPE_CHECKING, Any

from switchcli.data.sources.lines import ByteRange, decode
from switchcli.data.sources.records import RawRow

if TYPE_CHECKING:
    from pyarrow import Array
    from pyarrow.parquet import FileMetaData

_BATCH_ROWS = 256
_BUFFER_BYTES = 2**20


def read_rows(byte_range: ByteRange, columns: Sequence[str]) -> Iterator[RawRow]:
    """Yield the rows of the range with these columns, named by their number in the file, from 1.

    If one of `columns` is missing, a row has all columns of the file, those that are not needed with the value None:
    the error can then name them. Raises DataError for a file that is not Parquet.
    """
    from pyarrow.parquet import ParquetFile

    with byte_range.file.open() as file:
        # Reads a column of a row group through a buffer. By default all of it is read at once, which may be gigabytes.
        table = ParquetFile(file, buffer_size=_BUFFER_BYTES, pre_buffer=False)
        present = table.schema_arrow.names
        needed = [name for name in present if name in columns]
        unread = {} if set(columns) <= set(present) else dict.fromkeys(present)
        number = 0
        for group in range(table.num_row_groups):
            if not byte_range.contains(_start_offset(table.metadata, group)):
                # Rows of other ranges count too: a row is named by its number in the file.
                number += table.metadata.row_group(group).num_rows
                continue
            for batch in table.iter_batches(_BATCH_ROWS, [group], needed, use_threads=False):
                # A batch holds columns; turn them into rows. Without a needed column, each row is an empty tuple.
                rows = zip(*map(_values, batch.columns), strict=True) if needed else repeat((), batch.num_rows)
                for row in rows:
                    number += 1
                    name = f"{byte_range.file.name}:{number}"
                    fields = unread | dict(zip(batch.schema.names, row, strict=True))
                    yield RawRow(name, partial(str, name), partial(_decode_fields, fields))


def _start_offset(metadata: "FileMetaData", group: int) -> int:
    """Return the byte offset at which a row group begins: that of the first page of its first column.

    It decides which byte range reads the group. Any offset that increases from group to group would do. Groups without
    columns have no pages, and belong to the range that begins the file.
    """
    if not metadata.num_columns:
        return 0
    column = metadata.row_group(group).column(0)
    return int(column.dictionary_page_offset if column.has_dictionary_page else column.data_page_offset)


def _values(column: "Array") -> list[Any]:
    """Return the values of a column, text as bytes: rows that are not UTF-8 are then reported one by one."""
    import pyarrow as pa

    if pa.types.is_dictionary(column.type):
        column = column.dictionary_decode()
    is_text = pa.types.is_string(column.type) or pa.types.is_large_string(column.type)
    return (column.cast(pa.large_binary()) if is_text else column).to_pylist()


def _decode_fields(fields: Mapping[str, object]) -> Mapping[str, object]:
    return {name: decode(value) if isinstance(value, bytes) else value for name, value in fields.items()}
