"""What a failed request to S3 means: in a few words, whether it may pass, and what to check.

Texts of the HTTP library are never quoted: they may hold headers, and so session tokens.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from urllib.parse import urlsplit

from botocore import exceptions as aws
from botocore.parsers import ResponseParserError

# Passing failures of the way to the server and back, the more special first.
CONNECTION = {
    aws.ConnectTimeoutError: "no connection in time",
    aws.ReadTimeoutError: "no answer in time",
    aws.ProxyConnectionError: "no connection to the proxy",
    aws.SSLError: "TLS broke off",
    aws.FlexibleChecksumError: "damaged on the way",
    aws.IncompleteReadError: "connection cut",
    ResponseParserError: "unreadable answer",
    aws.ConnectionError: "no connection",
    aws.HTTPClientError: "connection cut",
}
BUSY = (429, 500, 502, 503, 504)
PASSING = ("BadDigest", "IncompleteBody", "OperationAborted", "RequestTimeout", "SlowDown", "Throttling")
ABSENT = ("404", "NoSuchBucket", "NoSuchKey", "NoSuchUpload", "NotFound")
ERRORS = (aws.BotoCoreError, aws.ClientError, ResponseParserError)

ANONYMOUS = "AWS_NO_SIGN_REQUEST is set, and only public buckets can be read so"
ACCESS = (
    "check AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY or AWS_PROFILE, this machine's clock, and that the bucket's "
    "owner and policy let this account in"
)
UNKNOWN = "set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY or AWS_PROFILE, or AWS_NO_SIGN_REQUEST=YES for public data"
ADVICE = {
    "InvalidAccessKeyId": "the endpoint does not know the key; check AWS_ACCESS_KEY_ID, AWS_PROFILE, AWS_ENDPOINT_URL",
    "SignatureDoesNotMatch": "the secret is not the key's; check AWS_SECRET_ACCESS_KEY or AWS_PROFILE",
    "RequestTimeTooSkewed": "this machine's clock is off by minutes; set it (date, NTP)",
    "ExpiredToken": "the session token has expired; log in again",
    "NoSuchBucket": "check the bucket's name, AWS_ENDPOINT_URL and AWS_REGION",
    "PermanentRedirect": "the bucket is in another region; check AWS_REGION",
}


@dataclass(frozen=True)
class Failure:
    """A failed request.

    Attributes:
        reason: in a few words; what retries are counted by.
        advice: what to check.
        passes: the same request may go well the next time.
        absent: what was asked for is not there.
    """

    reason: str
    advice: str
    passes: bool = False
    absent: bool = False


def understand(error: Exception, endpoint: str, anonymous: bool) -> Failure:
    """What one of `ERRORS` means.

    Args:
        error: of boto3.
        endpoint: that was asked; named in the advice without what may stand before an @.
        anonymous: the request was not signed.
    """
    if isinstance(error, aws.ClientError):
        return _answer(error, anonymous)
    for kind, reason in CONNECTION.items():
        if isinstance(error, kind):
            return _connection(error, reason, endpoint)
    if isinstance(error, aws.NoCredentialsError):
        return Failure("no credentials found", UNKNOWN)
    return Failure(line(error), "check AWS_PROFILE, AWS_ENDPOINT_URL and AWS_REGION, and the bucket's name")


def _answer(error: aws.ClientError, anonymous: bool) -> Failure:
    """What the server answered; to HEAD it answers without a code."""
    code, status = error.response["Error"].get("Code", ""), error.response["ResponseMetadata"]["HTTPStatusCode"]
    named = f"{status}" if code in ("", str(status)) else f"{status} {code}"
    if status in BUSY or code.startswith(PASSING):
        return Failure(named, "the server is busy or broken; the same command goes on later", passes=True)
    if status in (401, 403):
        return Failure(f"access denied ({named})", ANONYMOUS if anonymous else ADVICE.get(code, ACCESS))
    if status == 416:
        return Failure("the object ends before these bytes", "it is truncated; build it again or restore it")
    if status == 404:
        advice = ADVICE.get(code, "check the bucket, the prefix and AWS_ENDPOINT_URL")
        return Failure(f"not found ({named})", advice, absent=code in ABSENT)
    return Failure(f"{named}: {error.response['Error'].get('Message', '')}", ADVICE.get(code, "check AWS_ENDPOINT_URL"))


def _connection(error: Exception, reason: str, endpoint: str) -> Failure:
    text, at = str(error), urlsplit(endpoint)
    if "Invalid header" in text:
        return Failure("a credential holds a line break", "check AWS_ACCESS_KEY_ID and AWS_SESSION_TOKEN")
    if isinstance(error, aws.SSLError) and "CERTIFICATE" in text.upper():
        return Failure("the server's certificate is not trusted", "check AWS_ENDPOINT_URL and AWS_CA_BUNDLE")
    cause = re.search(r"\[Errno -?\d+\] (\w[\w ]+)", str(getattr(error, "kwargs", {}).get("error")))
    if cause and reason == "no connection":
        reason = cause[1].lower()
    server = f"{at.scheme}://{at.netloc.rpartition('@')[2]}"
    return Failure(reason, f"check that {server} is the right AWS_ENDPOINT_URL, and the network", passes=True)


def line(error: Exception) -> str:
    """The text of an error in one line."""
    return " ".join(str(error).split())
