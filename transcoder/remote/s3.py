"""S3 and what speaks its protocol, through botocore: credentials, region and endpoint as AWS's own tools find them."""

from __future__ import annotations

import base64
import hashlib
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing, contextmanager
from functools import lru_cache
from typing import Any

from transcoder.remote.store import CONNECT_SECONDS, IDLE_SECONDS, Entry, Failed, Store

CONNECTIONS = 64
KINDS = {
    "NoSuchBucket": "bucket",
    "NoSuchKey": "missing",
    "NoSuchUpload": "missing",
    "404": "missing",
    "PreconditionFailed": "changed",
    "412": "changed",
    "ConditionalRequestConflict": "transient",
    "InvalidAccessKeyId": "credentials",
    "SignatureDoesNotMatch": "credentials",
    "ExpiredToken": "credentials",
    "InvalidToken": "credentials",
    "AccessDenied": "denied",
    "AllAccessDisabled": "denied",
    "403": "denied",
    "PermanentRedirect": "endpoint",
    "AuthorizationHeaderMalformed": "endpoint",
    "IllegalLocationConstraintException": "endpoint",
    "301": "endpoint",
    "SlowDown": "transient",
    "Throttling": "transient",
    "ThrottlingException": "transient",
    "TooManyRequests": "transient",
    "RequestTimeout": "transient",
    "RequestTimeTooSkewed": "credentials",
    "InternalError": "transient",
    "ServiceUnavailable": "transient",
}


@lru_cache
def _client() -> Any:
    import botocore.session
    from botocore.config import Config

    session = botocore.session.get_session()
    endpoint = os.environ.get("AWS_ENDPOINT_URL_S3") or os.environ.get("AWS_ENDPOINT_URL")
    config = Config(
        connect_timeout=CONNECT_SECONDS,
        read_timeout=IDLE_SECONDS,
        max_pool_connections=CONNECTIONS,
        retries={"total_max_attempts": 1},
        s3={"addressing_style": "path"} if endpoint else {},
        request_checksum_calculation="when_required",  # other stores than Amazon's refuse the newer trailers
        response_checksum_validation="when_required",
    )
    region = session.get_config_variable("region") or "us-east-1"
    return session.create_client("s3", region_name=region, config=config)


@contextmanager
def _failures() -> Iterator[None]:
    """botocore's errors, and those of the connection below it, as `Failed`."""
    from botocore import exceptions as known

    try:
        yield
    except known.ClientError as error:
        raise _refused(error.response) from error
    except (known.NoCredentialsError, known.PartialCredentialsError, known.ProfileNotFound) as error:
        raise Failed("credentials", str(error)) from error
    except (known.EndpointConnectionError, known.ConnectTimeoutError) as error:
        raise Failed("transient", str(error)) from error
    except (known.HTTPClientError, known.ConnectionError, known.ResponseStreamingError) as error:
        raise Failed("transient", f"the connection was lost ({type(error).__name__})") from error
    except OSError as error:
        raise Failed("transient", f"the connection was lost ({type(error).__name__})") from error
    except known.BotoCoreError as error:
        raise Failed("other", str(error)) from error


def _refused(response: dict[str, Any]) -> Failed:
    error, meta = response.get("Error", {}), response.get("ResponseMetadata", {})
    code, status = str(error.get("Code", "")), int(meta.get("HTTPStatusCode", 0))
    kind = KINDS.get(code, "transient" if status in (408, 429) or status >= 500 else "other")
    after = str(meta.get("HTTPHeaders", {}).get("retry-after", ""))
    text = f"{code}: {error.get('Message') or 'no message'} (status {status})"
    return Failed(kind, text, float(after) if after.isdigit() else 0.0)


class S3(Store):
    """A bucket."""

    resumable = True

    def __init__(self, bucket: str) -> None:
        self._bucket, self.url = bucket, f"s3://{bucket}"
        with _failures():
            self._client = _client()

    def _call(self, name: str, **arguments: Any) -> dict[str, Any]:
        with _failures():
            call: Callable[..., dict[str, Any]] = getattr(self._client, name)
            return call(Bucket=self._bucket, **arguments)

    def list(self, prefix: str, limit: int) -> dict[str, Entry]:
        """Objects whose names begin with `prefix`."""
        found: dict[str, Entry] = {}
        more: dict[str, Any] = {"MaxKeys": min(limit, 1000)}
        while more and len(found) < limit:
            page = self._call("list_objects_v2", Prefix=prefix, **more)
            found |= {row["Key"]: Entry(row["Size"], row["ETag"]) for row in page.get("Contents", ())}
            more = {"ContinuationToken": page["NextContinuationToken"]} if page.get("IsTruncated") else {}
        return found

    def head(self, key: str) -> Entry | None:
        """One object, None when there is none."""
        try:
            found = self._call("head_object", Key=key)
        except Failed as failure:
            if failure.kind == "missing":
                return None
            raise
        return Entry(found["ContentLength"], found["ETag"])

    def read(self, key: str, start: int, stop: int, etag: str) -> bytes:
        """The bytes [start, stop) of this version."""
        with _failures():
            place = {"Bucket": self._bucket, "Key": key}
            found = self._client.get_object(**place, Range=f"bytes={start}-{stop - 1}", IfMatch=etag)
            with closing(found["Body"]) as body:
                if found["ContentLength"] != stop - start:
                    raise Failed("transient", f"{found['ContentLength']} bytes came for a range of {stop - start}")
                data: bytes = body.read()
        if found["ETag"] != etag:
            raise Failed("changed", "the object is another one now")
        return data

    def put(self, key: str, data: bytes | bytearray, fresh: bool = False) -> str:
        """Write a whole object. Returns its ETag."""
        condition = {"IfNoneMatch": "*"} if fresh else {}
        try:
            found = self._call("put_object", Key=key, Body=data, ContentMD5=_md5(data), **condition)
        except Failed as failure:
            if fresh and failure.kind == "changed":
                raise Failed("exists", str(failure)) from failure
            raise
        return str(found["ETag"])

    def delete(self, key: str) -> None:
        """Remove an object."""
        self._call("delete_object", Key=key)

    def upload(self, key: str) -> str:
        """Begin an object that comes in parts."""
        return str(self._call("create_multipart_upload", Key=key)["UploadId"])

    def part(self, key: str, upload: str, number: int, data: bytearray) -> str:
        """Send a part. Returns its ETag."""
        more = {"UploadId": upload, "PartNumber": number + 1, "ContentMD5": _md5(data)}
        return str(self._call("upload_part", Key=key, Body=data, **more)["ETag"])

    def parts(self, key: str, upload: str) -> dict[int, str] | None:
        """The parts that were sent, None when the upload is gone."""
        found: dict[int, str] = {}
        more: dict[str, Any] = {"PartNumberMarker": 0}
        while more:
            try:
                page = self._call("list_parts", Key=key, UploadId=upload, **more)
            except Failed as failure:
                if failure.kind == "missing":
                    return None
                raise
            found |= {row["PartNumber"] - 1: row["ETag"] for row in page.get("Parts", ())}
            more = {"PartNumberMarker": page["NextPartNumberMarker"]} if page.get("IsTruncated") else {}
        return found

    def complete(self, key: str, upload: str, etags: Sequence[str]) -> None:
        """Let the object appear."""
        rows = [{"PartNumber": number + 1, "ETag": etag} for number, etag in enumerate(etags)]
        self._call("complete_multipart_upload", Key=key, UploadId=upload, MultipartUpload={"Parts": rows})

    def abort(self, key: str, upload: str) -> None:
        """Give the upload up."""
        try:
            self._call("abort_multipart_upload", Key=key, UploadId=upload)
        except Failed as failure:
            if failure.kind != "missing":
                raise


def _md5(data: bytes | bytearray) -> str:
    return base64.b64encode(hashlib.md5(data, usedforsecurity=False).digest()).decode()
