from google.protobuf.internal import enum_type_wrapper as _enum_type_wrapper
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from collections.abc import Mapping as _Mapping
from typing import ClassVar as _ClassVar, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class Dtype(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    DTYPE_UNSPECIFIED: _ClassVar[Dtype]
    DTYPE_UINT32: _ClassVar[Dtype]
    DTYPE_FLOAT32: _ClassVar[Dtype]
DTYPE_UNSPECIFIED: Dtype
DTYPE_UINT32: Dtype
DTYPE_FLOAT32: Dtype

class TokenizerIdentity(_message.Message):
    __slots__ = ("tokenizer_sha256", "template_sha256")
    TOKENIZER_SHA256_FIELD_NUMBER: _ClassVar[int]
    TEMPLATE_SHA256_FIELD_NUMBER: _ClassVar[int]
    tokenizer_sha256: str
    template_sha256: str
    def __init__(self, tokenizer_sha256: _Optional[str] = ..., template_sha256: _Optional[str] = ...) -> None: ...

class DataIdentity(_message.Message):
    __slots__ = ("tokenizer", "source", "settings", "fingerprint")
    TOKENIZER_FIELD_NUMBER: _ClassVar[int]
    SOURCE_FIELD_NUMBER: _ClassVar[int]
    SETTINGS_FIELD_NUMBER: _ClassVar[int]
    FINGERPRINT_FIELD_NUMBER: _ClassVar[int]
    tokenizer: TokenizerIdentity
    source: str
    settings: str
    fingerprint: str
    def __init__(self, tokenizer: _Optional[_Union[TokenizerIdentity, _Mapping]] = ..., source: _Optional[str] = ..., settings: _Optional[str] = ..., fingerprint: _Optional[str] = ...) -> None: ...

class TeacherIdentity(_message.Message):
    __slots__ = ("model", "weights", "dtype", "backend", "tokenizer", "vocab_size", "top_k", "fingerprint", "temperatures")
    MODEL_FIELD_NUMBER: _ClassVar[int]
    WEIGHTS_FIELD_NUMBER: _ClassVar[int]
    DTYPE_FIELD_NUMBER: _ClassVar[int]
    BACKEND_FIELD_NUMBER: _ClassVar[int]
    TOKENIZER_FIELD_NUMBER: _ClassVar[int]
    VOCAB_SIZE_FIELD_NUMBER: _ClassVar[int]
    TOP_K_FIELD_NUMBER: _ClassVar[int]
    FINGERPRINT_FIELD_NUMBER: _ClassVar[int]
    TEMPERATURES_FIELD_NUMBER: _ClassVar[int]
    model: str
    weights: str
    dtype: str
    backend: str
    tokenizer: TokenizerIdentity
    vocab_size: int
    top_k: int
    fingerprint: str
    temperatures: bytes
    def __init__(self, model: _Optional[str] = ..., weights: _Optional[str] = ..., dtype: _Optional[str] = ..., backend: _Optional[str] = ..., tokenizer: _Optional[_Union[TokenizerIdentity, _Mapping]] = ..., vocab_size: _Optional[int] = ..., top_k: _Optional[int] = ..., fingerprint: _Optional[str] = ..., temperatures: _Optional[bytes] = ...) -> None: ...

class GetTeacherRequest(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class GetTeacherResponse(_message.Message):
    __slots__ = ("identity", "max_tokens", "max_pending_requests")
    IDENTITY_FIELD_NUMBER: _ClassVar[int]
    MAX_TOKENS_FIELD_NUMBER: _ClassVar[int]
    MAX_PENDING_REQUESTS_FIELD_NUMBER: _ClassVar[int]
    identity: TeacherIdentity
    max_tokens: int
    max_pending_requests: int
    def __init__(self, identity: _Optional[_Union[TeacherIdentity, _Mapping]] = ..., max_tokens: _Optional[int] = ..., max_pending_requests: _Optional[int] = ...) -> None: ...

class ScoreTokensRequest(_message.Message):
    __slots__ = ("tokenizer", "token_ids", "positions", "top_k", "first_row")
    TOKENIZER_FIELD_NUMBER: _ClassVar[int]
    TOKEN_IDS_FIELD_NUMBER: _ClassVar[int]
    POSITIONS_FIELD_NUMBER: _ClassVar[int]
    TOP_K_FIELD_NUMBER: _ClassVar[int]
    FIRST_ROW_FIELD_NUMBER: _ClassVar[int]
    tokenizer: TokenizerIdentity
    token_ids: bytes
    positions: bytes
    top_k: int
    first_row: int
    def __init__(self, tokenizer: _Optional[_Union[TokenizerIdentity, _Mapping]] = ..., token_ids: _Optional[bytes] = ..., positions: _Optional[bytes] = ..., top_k: _Optional[int] = ..., first_row: _Optional[int] = ...) -> None: ...

class ScoreTokensResponse(_message.Message):
    __slots__ = ("first_row", "num_rows", "top_k", "positions", "ids", "logprobs", "tail_logmass", "target_logprob", "checksum", "id_dtype", "logprob_dtype", "digest", "tail_logsumexps")
    FIRST_ROW_FIELD_NUMBER: _ClassVar[int]
    NUM_ROWS_FIELD_NUMBER: _ClassVar[int]
    TOP_K_FIELD_NUMBER: _ClassVar[int]
    POSITIONS_FIELD_NUMBER: _ClassVar[int]
    IDS_FIELD_NUMBER: _ClassVar[int]
    LOGPROBS_FIELD_NUMBER: _ClassVar[int]
    TAIL_LOGMASS_FIELD_NUMBER: _ClassVar[int]
    TARGET_LOGPROB_FIELD_NUMBER: _ClassVar[int]
    CHECKSUM_FIELD_NUMBER: _ClassVar[int]
    ID_DTYPE_FIELD_NUMBER: _ClassVar[int]
    LOGPROB_DTYPE_FIELD_NUMBER: _ClassVar[int]
    DIGEST_FIELD_NUMBER: _ClassVar[int]
    TAIL_LOGSUMEXPS_FIELD_NUMBER: _ClassVar[int]
    first_row: int
    num_rows: int
    top_k: int
    positions: bytes
    ids: bytes
    logprobs: bytes
    tail_logmass: bytes
    target_logprob: bytes
    checksum: int
    id_dtype: Dtype
    logprob_dtype: Dtype
    digest: bytes
    tail_logsumexps: bytes
    def __init__(self, first_row: _Optional[int] = ..., num_rows: _Optional[int] = ..., top_k: _Optional[int] = ..., positions: _Optional[bytes] = ..., ids: _Optional[bytes] = ..., logprobs: _Optional[bytes] = ..., tail_logmass: _Optional[bytes] = ..., target_logprob: _Optional[bytes] = ..., checksum: _Optional[int] = ..., id_dtype: _Optional[_Union[Dtype, str]] = ..., logprob_dtype: _Optional[_Union[Dtype, str]] = ..., digest: _Optional[bytes] = ..., tail_logsumexps: _Optional[bytes] = ...) -> None: ...

class PopulateCacheRequest(_message.Message):
    __slots__ = ("options", "trajectory", "file")
    OPTIONS_FIELD_NUMBER: _ClassVar[int]
    TRAJECTORY_FIELD_NUMBER: _ClassVar[int]
    FILE_FIELD_NUMBER: _ClassVar[int]
    options: PopulateOptions
    trajectory: TokenisedTrajectory
    file: TokensFile
    def __init__(self, options: _Optional[_Union[PopulateOptions, _Mapping]] = ..., trajectory: _Optional[_Union[TokenisedTrajectory, _Mapping]] = ..., file: _Optional[_Union[TokensFile, _Mapping]] = ...) -> None: ...

class PopulateOptions(_message.Message):
    __slots__ = ("data",)
    DATA_FIELD_NUMBER: _ClassVar[int]
    data: DataIdentity
    def __init__(self, data: _Optional[_Union[DataIdentity, _Mapping]] = ...) -> None: ...

class TokenisedTrajectory(_message.Message):
    __slots__ = ("trajectory_id", "token_ids", "positions")
    TRAJECTORY_ID_FIELD_NUMBER: _ClassVar[int]
    TOKEN_IDS_FIELD_NUMBER: _ClassVar[int]
    POSITIONS_FIELD_NUMBER: _ClassVar[int]
    trajectory_id: str
    token_ids: bytes
    positions: bytes
    def __init__(self, trajectory_id: _Optional[str] = ..., token_ids: _Optional[bytes] = ..., positions: _Optional[bytes] = ...) -> None: ...

class TokensFile(_message.Message):
    __slots__ = ("name",)
    NAME_FIELD_NUMBER: _ClassVar[int]
    name: str
    def __init__(self, name: _Optional[str] = ...) -> None: ...

class PopulateCacheResponse(_message.Message):
    __slots__ = ("trajectory_id", "outcome", "reason", "num_rows", "num_tokens", "cache_key", "record_digest")
    class Outcome(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
        __slots__ = ()
        OUTCOME_UNSPECIFIED: _ClassVar[PopulateCacheResponse.Outcome]
        OUTCOME_WRITTEN: _ClassVar[PopulateCacheResponse.Outcome]
        OUTCOME_PRESENT: _ClassVar[PopulateCacheResponse.Outcome]
        OUTCOME_REFUSED: _ClassVar[PopulateCacheResponse.Outcome]
    OUTCOME_UNSPECIFIED: PopulateCacheResponse.Outcome
    OUTCOME_WRITTEN: PopulateCacheResponse.Outcome
    OUTCOME_PRESENT: PopulateCacheResponse.Outcome
    OUTCOME_REFUSED: PopulateCacheResponse.Outcome
    TRAJECTORY_ID_FIELD_NUMBER: _ClassVar[int]
    OUTCOME_FIELD_NUMBER: _ClassVar[int]
    REASON_FIELD_NUMBER: _ClassVar[int]
    NUM_ROWS_FIELD_NUMBER: _ClassVar[int]
    NUM_TOKENS_FIELD_NUMBER: _ClassVar[int]
    CACHE_KEY_FIELD_NUMBER: _ClassVar[int]
    RECORD_DIGEST_FIELD_NUMBER: _ClassVar[int]
    trajectory_id: str
    outcome: PopulateCacheResponse.Outcome
    reason: str
    num_rows: int
    num_tokens: int
    cache_key: str
    record_digest: bytes
    def __init__(self, trajectory_id: _Optional[str] = ..., outcome: _Optional[_Union[PopulateCacheResponse.Outcome, str]] = ..., reason: _Optional[str] = ..., num_rows: _Optional[int] = ..., num_tokens: _Optional[int] = ..., cache_key: _Optional[str] = ..., record_digest: _Optional[bytes] = ...) -> None: ...
