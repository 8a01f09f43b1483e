from noria.v1 import inference_pb2 as _inference_pb2
from google.protobuf.internal import containers as _containers
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from collections.abc import Iterable as _Iterable, Mapping as _Mapping
from typing import ClassVar as _ClassVar, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class PutAdapterRequest(_message.Message):
    __slots__ = ("name", "version", "ttl_s", "data")
    NAME_FIELD_NUMBER: _ClassVar[int]
    VERSION_FIELD_NUMBER: _ClassVar[int]
    TTL_S_FIELD_NUMBER: _ClassVar[int]
    DATA_FIELD_NUMBER: _ClassVar[int]
    name: str
    version: str
    ttl_s: float
    data: bytes
    def __init__(self, name: _Optional[str] = ..., version: _Optional[str] = ..., ttl_s: _Optional[float] = ..., data: _Optional[bytes] = ...) -> None: ...

class Adapter(_message.Message):
    __slots__ = ("object", "name", "version", "fingerprint", "sha256", "rank", "ttl_s", "expires_at", "groups")
    OBJECT_FIELD_NUMBER: _ClassVar[int]
    NAME_FIELD_NUMBER: _ClassVar[int]
    VERSION_FIELD_NUMBER: _ClassVar[int]
    FINGERPRINT_FIELD_NUMBER: _ClassVar[int]
    SHA256_FIELD_NUMBER: _ClassVar[int]
    RANK_FIELD_NUMBER: _ClassVar[int]
    TTL_S_FIELD_NUMBER: _ClassVar[int]
    EXPIRES_AT_FIELD_NUMBER: _ClassVar[int]
    GROUPS_FIELD_NUMBER: _ClassVar[int]
    object: str
    name: str
    version: str
    fingerprint: str
    sha256: str
    rank: int
    ttl_s: float
    expires_at: float
    groups: int
    def __init__(self, object: _Optional[str] = ..., name: _Optional[str] = ..., version: _Optional[str] = ..., fingerprint: _Optional[str] = ..., sha256: _Optional[str] = ..., rank: _Optional[int] = ..., ttl_s: _Optional[float] = ..., expires_at: _Optional[float] = ..., groups: _Optional[int] = ...) -> None: ...

class DeleteAdapterRequest(_message.Message):
    __slots__ = ("name",)
    NAME_FIELD_NUMBER: _ClassVar[int]
    name: str
    def __init__(self, name: _Optional[str] = ...) -> None: ...

class DeleteAdapterResponse(_message.Message):
    __slots__ = ("object", "name", "deleted")
    OBJECT_FIELD_NUMBER: _ClassVar[int]
    NAME_FIELD_NUMBER: _ClassVar[int]
    DELETED_FIELD_NUMBER: _ClassVar[int]
    object: str
    name: str
    deleted: bool
    def __init__(self, object: _Optional[str] = ..., name: _Optional[str] = ..., deleted: _Optional[bool] = ...) -> None: ...

class ListAdaptersRequest(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class ListAdaptersResponse(_message.Message):
    __slots__ = ("data", "version", "most", "max_rank")
    DATA_FIELD_NUMBER: _ClassVar[int]
    VERSION_FIELD_NUMBER: _ClassVar[int]
    MOST_FIELD_NUMBER: _ClassVar[int]
    MAX_RANK_FIELD_NUMBER: _ClassVar[int]
    data: _containers.RepeatedCompositeFieldContainer[Adapter]
    version: str
    most: int
    max_rank: int
    def __init__(self, data: _Optional[_Iterable[_Union[Adapter, _Mapping]]] = ..., version: _Optional[str] = ..., most: _Optional[int] = ..., max_rank: _Optional[int] = ...) -> None: ...

class SampleGroupRequest(_message.Message):
    __slots__ = ("messages", "n", "temperature", "top_p", "top_k", "max_tokens", "seed", "adapter", "version")
    MESSAGES_FIELD_NUMBER: _ClassVar[int]
    N_FIELD_NUMBER: _ClassVar[int]
    TEMPERATURE_FIELD_NUMBER: _ClassVar[int]
    TOP_P_FIELD_NUMBER: _ClassVar[int]
    TOP_K_FIELD_NUMBER: _ClassVar[int]
    MAX_TOKENS_FIELD_NUMBER: _ClassVar[int]
    SEED_FIELD_NUMBER: _ClassVar[int]
    ADAPTER_FIELD_NUMBER: _ClassVar[int]
    VERSION_FIELD_NUMBER: _ClassVar[int]
    messages: _containers.RepeatedCompositeFieldContainer[_inference_pb2.ChatMessage]
    n: int
    temperature: float
    top_p: float
    top_k: int
    max_tokens: int
    seed: int
    adapter: str
    version: str
    def __init__(self, messages: _Optional[_Iterable[_Union[_inference_pb2.ChatMessage, _Mapping]]] = ..., n: _Optional[int] = ..., temperature: _Optional[float] = ..., top_p: _Optional[float] = ..., top_k: _Optional[int] = ..., max_tokens: _Optional[int] = ..., seed: _Optional[int] = ..., adapter: _Optional[str] = ..., version: _Optional[str] = ...) -> None: ...

class SampleGroupResponse(_message.Message):
    __slots__ = ("id", "object", "created", "version", "fingerprint", "adapter", "prompt_token_ids", "logprobs_temperature", "samples")
    ID_FIELD_NUMBER: _ClassVar[int]
    OBJECT_FIELD_NUMBER: _ClassVar[int]
    CREATED_FIELD_NUMBER: _ClassVar[int]
    VERSION_FIELD_NUMBER: _ClassVar[int]
    FINGERPRINT_FIELD_NUMBER: _ClassVar[int]
    ADAPTER_FIELD_NUMBER: _ClassVar[int]
    PROMPT_TOKEN_IDS_FIELD_NUMBER: _ClassVar[int]
    LOGPROBS_TEMPERATURE_FIELD_NUMBER: _ClassVar[int]
    SAMPLES_FIELD_NUMBER: _ClassVar[int]
    id: str
    object: str
    created: float
    version: str
    fingerprint: str
    adapter: str
    prompt_token_ids: _containers.RepeatedScalarFieldContainer[int]
    logprobs_temperature: float
    samples: _containers.RepeatedCompositeFieldContainer[Sample]
    def __init__(self, id: _Optional[str] = ..., object: _Optional[str] = ..., created: _Optional[float] = ..., version: _Optional[str] = ..., fingerprint: _Optional[str] = ..., adapter: _Optional[str] = ..., prompt_token_ids: _Optional[_Iterable[int]] = ..., logprobs_temperature: _Optional[float] = ..., samples: _Optional[_Iterable[_Union[Sample, _Mapping]]] = ...) -> None: ...

class Sample(_message.Message):
    __slots__ = ("index", "text", "token_ids", "logprobs", "finish_reason", "turns")
    INDEX_FIELD_NUMBER: _ClassVar[int]
    TEXT_FIELD_NUMBER: _ClassVar[int]
    TOKEN_IDS_FIELD_NUMBER: _ClassVar[int]
    LOGPROBS_FIELD_NUMBER: _ClassVar[int]
    FINISH_REASON_FIELD_NUMBER: _ClassVar[int]
    TURNS_FIELD_NUMBER: _ClassVar[int]
    index: int
    text: str
    token_ids: _containers.RepeatedScalarFieldContainer[int]
    logprobs: _containers.RepeatedScalarFieldContainer[float]
    finish_reason: str
    turns: int
    def __init__(self, index: _Optional[int] = ..., text: _Optional[str] = ..., token_ids: _Optional[_Iterable[int]] = ..., logprobs: _Optional[_Iterable[float]] = ..., finish_reason: _Optional[str] = ..., turns: _Optional[int] = ...) -> None: ...
