"""A failed request as the error that people see: one message with the URL, the next step, the right exit status."""

from __future__ import annotations

from transcoder.errors import InputError, OutputError, Problem, RemoteError, TranscoderError
from transcoder.remote.store import Failed

HINTS = {
    "transient": "the store does not answer or is too busy: go on with --resume later",
    "missing": "look for the object's name",
    "bucket": "look for its name, and whether these credentials may see it",
    "credentials": "see AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY or AWS_PROFILE",
    "denied": "ask for the permission to list, read and, for a destination, write there",
    "changed": "somebody wrote to it meanwhile: begin again",
    "endpoint": "see AWS_REGION, AWS_ENDPOINT_URL and HF_ENDPOINT",
    "exists": "another run made it meanwhile",
}
OTHER_CREDENTIALS = {
    "gs": "see GOOGLE_APPLICATION_CREDENTIALS, or log in with `gcloud auth application-default login`",
    "hf": "log in with `hf auth login`, or set HF_TOKEN",
}


def explained(failure: Failed, url: str, writing: bool) -> TranscoderError:
    """The error. Of a source: refused, exit 3, but for a store that is lost; of a destination: exit 4."""
    scheme = url.partition(":")[0]
    hint = HINTS.get(failure.kind, "see what the store says")
    if failure.kind in ("credentials", "denied"):
        hint = OTHER_CREDENTIALS.get(scheme, hint)
    problem = Problem(file=url, found=str(failure) or failure.kind, hint=hint)
    if failure.kind == "transient":
        return RemoteError(f"{url}: the object store is lost", kind="lost-remote", problems=[problem])
    if writing:
        return OutputError("the destination cannot be used", kind="destination", problems=[problem])
    if failure.kind == "changed":
        return InputError("the source changed during the run", kind="source-changed", problems=[problem])
    return RemoteError("the source cannot be read", source=True, kind="remote", problems=[problem])


def missing_extra(url: str, module: str, writing: bool) -> TranscoderError:
    """The error for a library that is not installed."""
    hint = "install the extra: pip install 'megatron-transcoder[remote]'"
    problem = Problem(file=url, expected=f"the library {module}", found="it is not installed", hint=hint)
    kind = OutputError if writing else InputError
    return kind("object stores need an extra of this package", kind="extra", problems=[problem])
