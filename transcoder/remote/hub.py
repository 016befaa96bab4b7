"""`hf://org/name[@revision]`: a repository of the Hugging Face hub, read range by range; nothing is kept on disk."""

from __future__ import annotations

from typing import Any

from transcoder.remote.store import Entry, Failed, Store


class Hub(Store):
    """A revision of a model repository, resolved to a commit when it is opened."""

    def __init__(self, name: str, revision: str) -> None:
        from huggingface_hub import HfApi

        self.url, self._name = f"hf://{name}" + (f"@{revision}" if revision else ""), name
        self._api = HfApi()
        info = self._called(self._api.model_info, name, revision=revision or None, files_metadata=True)
        self._commit = str(info.sha)
        self._files = {
            row.rfilename: Entry(row.size, row.lfs.sha256 if row.lfs else str(row.blob_id)) for row in info.siblings
        }

    def _called(self, call: Any, *arguments: Any, **options: Any) -> Any:
        from huggingface_hub import errors

        try:
            return call(*arguments, **options)
        except (errors.GatedRepoError, errors.RepositoryNotFoundError) as error:
            gated = isinstance(error, errors.GatedRepoError)
            raise Failed("denied" if gated else "bucket", str(error).split("\n")[0]) from error
        except errors.RevisionNotFoundError as error:
            raise Failed("bucket", str(error).split("\n")[0]) from error
        except errors.OfflineModeIsEnabled as error:
            raise Failed("endpoint", str(error).split("\n")[0]) from error
        except errors.HfHubHTTPError as error:
            raise self._refused(error) from error
        except OSError as error:
            raise Failed("transient", str(error).split("\n")[0] or type(error).__name__) from error
        except Exception as error:
            if type(error).__module__.split(".")[0] not in ("httpx", "httpcore", "httpx2", "httpcore2", "requests"):
                raise
            raise Failed("transient", f"the connection was lost ({type(error).__name__})") from error

    def _refused(self, error: Any) -> Failed:
        status = getattr(error.response, "status_code", 0)
        after = str(error.response.headers.get("retry-after", "")) if error.response is not None else ""
        passing = status in (408, 429) or status >= 500
        kind = "transient" if passing else "credentials" if status in (401, 403) else "other"
        return Failed(kind, str(error).split("\n")[0], float(after) if after.isdigit() else 0.0)

    def list(self, prefix: str, limit: int) -> dict[str, Entry]:
        """Objects whose names begin with `prefix`."""
        return {name: entry for name, entry in sorted(self._files.items()) if name.startswith(prefix)}

    def head(self, key: str) -> Entry | None:
        """One object, None when there is none."""
        return self._files.get(key)

    def read(self, key: str, start: int, stop: int, etag: str) -> bytes:
        """The bytes [start, stop) of this version."""
        from huggingface_hub import get_session, hf_hub_url
        from huggingface_hub.utils._headers import build_hf_headers
        from huggingface_hub.utils._http import hf_raise_for_status

        url = hf_hub_url(self._name, key, revision=self._commit, endpoint=self._api.endpoint)
        headers = build_hf_headers() | {"range": f"bytes={start}-{stop - 1}"}

        def get() -> bytes:
            response = get_session().get(url, headers=headers, follow_redirects=True, timeout=30.0)
            hf_raise_for_status(response)
            if response.status_code != 206 and len(response.content) != stop - start:
                raise Failed("transient", f"{len(response.content)} bytes came for a range of {stop - start}")
            return bytes(response.content)

        found: bytes = self._called(get)
        return found
