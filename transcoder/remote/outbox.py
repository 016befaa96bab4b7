"""Everything that a run writes to a bucket, and the order in which it appears: payloads, side files, the commit last.

A checkpoint that is replaced stays as it is until all parts of the new one have been sent: then its index goes, the
objects appear, and the new index does.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from threading import Lock, local
from typing import TYPE_CHECKING, TypeVar

from transcoder.errors import OutputError, Problem
from transcoder.formats.safetensors import INDEX_NAME, SINGLE_NAME
from transcoder.iterations import TRACKERS
from transcoder.remote.store import Entry, Failed, Store
from transcoder.remote.uploads import Upload, part_size

if TYPE_CHECKING:
    from transcoder.remote.journal import RemoteJournal
    from transcoder.remote.paths import RemotePath

T = TypeVar("T")
KEPT = "hf-kept.safetensors"  # read again while the manifest is made
INDICES = (".metadata", ".zmetadata", ".zarray", "zarr.json")
FIRST, INDEX, COMMIT, AFTER = range(4)  # when an object appears
Place = tuple[str, int]  # object and number of a part


class Outbox:
    """The writes of one run. replacing: the objects take the places of an older checkpoint's. budget: of open parts."""

    def __init__(self, root: RemotePath, journal: RemoteJournal, replacing: bool, budget: int) -> None:
        self._root, self._journal, self.replacing = root, journal, replacing
        self._budget, self._taken = budget, 0
        self._uploads: dict[str, Upload] = {}
        self.whole: dict[str, Entry] = {}  # objects that have appeared
        self.held: dict[str, bytes] = {}  # those that come later
        self._lock, self._mine = Lock(), local()
        self._places: dict[str, set[Place]] = {}
        self._there: dict[str, Entry] | None = None  # what an earlier run may have put

    @property
    def store(self) -> Store:
        """The bucket."""
        return self._root.bucket.store

    def begin(self, sizes: dict[str, int]) -> None:
        """Start, or take up, uploads of objects of these sizes, and note their ids where the next run finds them."""
        missing = [key for key in sizes if key not in self._uploads]
        if self._journal.puts and self._there is None:
            self._there = self._asked(lambda: self.store.list(f"{self._root.key}/", 1 << 30), self._root.key)
        for upload in self._root.bucket.pool.map(lambda key: self._upload(key, sizes[key]), missing):
            self._uploads[upload.key] = upload
        self._journal.ship()

    def file(self, key: str, size: int) -> Upload:
        """An object of this size, to be written."""
        if key not in self._uploads:
            self.begin({key: size})
        return self._uploads[key]

    def _upload(self, key: str, size: int) -> Upload:
        known = self._journal.uploads.get(key)
        if key in self._journal.wholes:
            return self._finished(key, size)
        if known is not None and self.store.resumable:
            parts = self._asked(lambda: self.store.parts(key, known), key)
            if parts is not None:
                return Upload(self, key, size, known, parts)
            if key in self._journal.completing:
                return self._finished(key, size)
            raise self._lost(key)
        if not self.replacing and self._turn(key) == FIRST and 0 < size <= part_size(size):
            return self._single(key, size)
        made = self._asked(lambda: self.store.upload(key), key)
        self._journal.append({"upload": key, "id": made})
        return Upload(self, key, size, made, {})

    def _single(self, key: str, size: int) -> Upload:
        """An object that is put at once when all of it is there; it is done if an earlier run has put it."""
        there = (self._there or {}).get(key) if key in self._journal.puts else None
        self._journal.append({"put": key})
        if there is None or there.size != size:
            return Upload(self, key, size, "", {})
        self.whole[key] = there
        return Upload(self, key, size, "", {0: there.etag})

    def _finished(self, key: str, size: int) -> Upload:
        """An object that an earlier run completed. Raises OutputError when it is gone."""
        found = self._asked(lambda: self.store.head(key), key)
        if found is None or found.size != size:
            raise self._lost(key)
        self.whole[key] = found
        done = Upload(self, key, size, "", {})
        done.etags = dict.fromkeys(range(done.count), "")
        return done

    def _lost(self, key: str) -> OutputError:
        hint = "start anew with --overwrite"
        problem = Problem(file=f"{self.store.url}/{key}", found="what was sent of it is gone", hint=hint)
        return OutputError("the unfinished run cannot go on", kind="resume", problems=[problem])

    def put(self, key: str, data: bytes | memoryview) -> None:
        """A small object: it appears in its turn."""
        if self.replacing or self._turn(key) != FIRST:
            self.held[key] = bytes(data)
            self._root.bucket.forget()
        else:
            self._put(key, bytes(data))

    def _put(self, key: str, data: bytes) -> None:
        self._journal.append({"put": key})
        etag = self._asked(lambda: self.store.put(key, data), key)
        self.whole[key] = Entry(len(data), etag)
        self._root.bucket.forget()

    def _turn(self, key: str) -> int:
        folder, _, name = key.rpartition("/")
        if folder == self._root.key and name in TRACKERS:
            return AFTER if self.replacing else FIRST
        if name == "metadata.json" or (folder == self._root.key and name in (INDEX_NAME, SINGLE_NAME)):
            return COMMIT
        return INDEX if name in INDICES else FIRST

    def take(self, size: int) -> None:
        """Room for an open part. Raises OutputError when --memory has none."""
        with self._lock:
            self._taken += size
            full = self._taken > self._budget
        if full:
            found = f"{self._taken >> 20} MiB of unfinished parts, {self._budget >> 20} MiB of room"
            hint = "give a larger --memory, then --resume goes on"
            problem = Problem(file=str(self._root), found=found, hint=hint)
            raise OutputError("too many objects are written at the same time", kind="memory", problems=[problem])

    def give(self, size: int) -> None:
        """The room is free again."""
        with self._lock:
            self._taken -= size

    def attend(self, name: str) -> None:
        """What the thread writes from now on belongs to this tensor; others may have written for it before."""
        self._mine.places = self._places.setdefault(name, set())

    def touch(self, place: Place) -> None:
        """The thread has written into a part; `touched` tells of it."""
        self._mine.__dict__.setdefault("places", set()).add(place)

    def touched(self) -> set[Place]:
        """The parts of the thread's writes since the last call that would not outlive this process."""
        places: set[Place] = self._mine.__dict__.setdefault("places", set())
        found = {(key, number) for key, number in places if not self.safe(key, number)}
        places.clear()
        return found

    def safe(self, key: str, number: int) -> bool:
        """Whether a part would outlive this process."""
        return key in self.whole or (self.store.resumable and number in self._uploads[key].etags)

    def send(self, upload: Upload, number: int, part: bytearray) -> str:
        """Send a full part. Returns its ETag."""
        if not upload.id:
            return self._asked(lambda: self.store.put(upload.key, part), upload.key)
        return self._asked(lambda: self.store.part(upload.key, upload.id, number, part), upload.key)

    def sent(self, upload: Upload, number: int, full: bool) -> None:
        """A part was sent, and perhaps all of them."""
        if not upload.id:
            self._appeared(upload, Entry(upload.size, upload.etags[0]))
        elif full and self._turn(upload.key) == FIRST and (not self.replacing or upload.key.endswith(f"/{KEPT}")):
            self._complete(upload)
        elif self.store.resumable:
            self._journal.safe([(upload.key, number)])
        self._journal.breathe()

    def _complete(self, upload: Upload) -> None:
        if not upload.full:
            raise RuntimeError(f"{upload.key}: {upload.count - len(upload.etags)} parts were not written")
        if upload.key in self.whole:
            return
        if upload.count:
            self._journal.append({"completing": upload.key})
            self._journal.ship()
            self._asked(_Completing(self.store, upload), upload.key)
        else:
            self._asked(lambda: self.store.abort(upload.key, upload.id), upload.key)
            self._asked(lambda: self.store.put(upload.key, b""), upload.key)
        found = self._asked(lambda: self.store.head(upload.key), upload.key)
        self._journal.append({"whole": upload.key})
        self._appeared(upload, found or Entry(upload.size, ""))

    def _appeared(self, upload: Upload, entry: Entry) -> None:
        self.whole[upload.key] = entry
        self._root.bucket.forget()
        self._journal.safe([(upload.key, number) for number in range(upload.count)])

    def publish(self, stale: Iterable[str]) -> None:
        """Let everything appear, the commit last; then objects of an older checkpoint go that were not replaced."""
        names = {f"{self._root.key}/{name}" for name in stale} if self.replacing else set()
        self._root.bucket.remove(key for key in self._old() | names if self._turn(key) in (INDEX, COMMIT))
        uploads = sorted(self._uploads.values(), key=lambda upload: self._turn(upload.key))
        for upload in (upload for upload in uploads if self._turn(upload.key) == FIRST):
            self._complete(upload)
        for turn in range(AFTER + 1):
            held = sorted(key for key in self.held if self._turn(key) == turn)
            for _ in self._root.bucket.pool.map(lambda key: self._put(key, self.held[key]), held):
                pass
            for upload in (upload for upload in uploads if self._turn(upload.key) == turn):
                self._complete(upload)
        self._root.bucket.remove((self._old() | names) - self.whole.keys())
        self.held.clear()

    def _old(self) -> set[str]:
        """Objects that lay in the folders that this run writes, other than those of the root."""
        root = f"{self._root.key}/".lstrip("/")
        wanted = {*self._uploads, *self.held, *self.whole}
        folders = {key[len(root) :].partition("/")[0] for key in wanted if "/" in key[len(root) :]}
        listed = self._asked(lambda: self.store.list(root, 1 << 30), root) if self.replacing else {}
        below = {key: key[len(root) :].partition("/") for key in listed}
        return {key for key, (folder, slash, _) in below.items() if key in wanted or (slash and folder in folders)}

    def give_up(self) -> None:
        """Abort every upload, and remove what appeared of a checkpoint that is none."""
        for upload in self._uploads.values():
            if upload.id and upload.key not in self.whole:
                self._asked(lambda upload=upload: self.store.abort(upload.key, upload.id), upload.key)  # type: ignore[misc]
        if not self.replacing:
            self._root.bucket.remove({*self.whole, *(key for key, upload in self._uploads.items() if not upload.id)})

    def _asked(self, call: Callable[[], T], key: str) -> T:
        return self._root.bucket.asked(call, key)


class _Completing:
    """Completes an upload; asked again after an answer was lost, it may find that done."""

    def __init__(self, store: Store, upload: Upload) -> None:
        self._store, self._upload, self._asked = store, upload, False

    def __call__(self) -> None:
        upload, again, self._asked = self._upload, self._asked, True
        try:
            self._store.complete(upload.key, upload.id, [upload.etags[number] for number in range(upload.count)])
        except Failed as failure:
            found = self._store.head(upload.key) if again and failure.kind == "missing" else None
            if found is None or found.size != upload.size:
                raise
