"""Reading pieces of files at random: one `pread` a piece, and few open files however many there are."""

import os
from collections import OrderedDict
from collections.abc import Callable

WHOLE = -1  # as a size: the file from end to end


class OpenFiles:
    """Reads by (file number, offset, size), keeping the `limit` files used last open. Not to be shared over a fork."""

    def __init__(self, path_of: Callable[[int], str], limit: int = 64) -> None:
        self._path_of, self._limit = path_of, limit
        self._open: OrderedDict[int, int] = OrderedDict()

    def read(self, number: int, offset: int, size: int) -> bytes:
        """`size` bytes from `offset`. Raises OSError, also where the file ends before."""
        if number in self._open:
            self._open.move_to_end(number)
        else:
            if len(self._open) >= self._limit:
                os.close(self._open.popitem(last=False)[1])
            self._open[number] = os.open(self._path_of(number), os.O_RDONLY)
        handle = self._open[number]
        if size == WHOLE:
            size = os.fstat(handle).st_size
        data = os.pread(handle, size, offset)
        if len(data) != size:
            raise OSError(f"{self._path_of(number)} ends at byte {offset + len(data)}, before {offset + size}")
        return data

    def close(self) -> None:
        """Close every file."""
        while self._open:
            os.close(self._open.popitem()[1])

    def __del__(self) -> None:
        self.close()
