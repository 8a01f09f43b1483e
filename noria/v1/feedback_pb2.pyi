from google.protobuf.internal import containers as _containers
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from collections.abc import Iterable as _Iterable, Mapping as _Mapping
from typing import ClassVar as _ClassVar, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class Side(_message.Message):
    __slots__ = ("completion_id", "index", "text")
    COMPLETION_ID_FIELD_NUMBER: _ClassVar[int]
    INDEX_FIELD_NUMBER: _ClassVar[int]
    TEXT_FIELD_NUMBER: _ClassVar[int]
    completion_id: str
    index: int
    text: str
    def __init__(self, completion_id: _Optional[str] = ..., index: _Optional[int] = ..., text: _Optional[str] = ...) -> None: ...

class RecordPreferenceRequest(_message.Message):
    __slots__ = ("chosen", "rejected", "verdict", "annotator", "comment")
    CHOSEN_FIELD_NUMBER: _ClassVar[int]
    REJECTED_FIELD_NUMBER: _ClassVar[int]
    VERDICT_FIELD_NUMBER: _ClassVar[int]
    ANNOTATOR_FIELD_NUMBER: _ClassVar[int]
    COMMENT_FIELD_NUMBER: _ClassVar[int]
    chosen: Side
    rejected: Side
    verdict: str
    annotator: str
    comment: str
    def __init__(self, chosen: _Optional[_Union[Side, _Mapping]] = ..., rejected: _Optional[_Union[Side, _Mapping]] = ..., verdict: _Optional[str] = ..., annotator: _Optional[str] = ..., comment: _Optional[str] = ...) -> None: ...

class RecordPreferenceResponse(_message.Message):
    __slots__ = ("preference", "created")
    PREFERENCE_FIELD_NUMBER: _ClassVar[int]
    CREATED_FIELD_NUMBER: _ClassVar[int]
    preference: Preference
    created: bool
    def __init__(self, preference: _Optional[_Union[Preference, _Mapping]] = ..., created: _Optional[bool] = ...) -> None: ...

class Preference(_message.Message):
    __slots__ = ("id", "object", "created_at", "chosen", "rejected", "verdict", "annotator", "comment", "source")
    ID_FIELD_NUMBER: _ClassVar[int]
    OBJECT_FIELD_NUMBER: _ClassVar[int]
    CREATED_AT_FIELD_NUMBER: _ClassVar[int]
    CHOSEN_FIELD_NUMBER: _ClassVar[int]
    REJECTED_FIELD_NUMBER: _ClassVar[int]
    VERDICT_FIELD_NUMBER: _ClassVar[int]
    ANNOTATOR_FIELD_NUMBER: _ClassVar[int]
    COMMENT_FIELD_NUMBER: _ClassVar[int]
    SOURCE_FIELD_NUMBER: _ClassVar[int]
    id: str
    object: str
    created_at: float
    chosen: Side
    rejected: Side
    verdict: str
    annotator: str
    comment: str
    source: str
    def __init__(self, id: _Optional[str] = ..., object: _Optional[str] = ..., created_at: _Optional[float] = ..., chosen: _Optional[_Union[Side, _Mapping]] = ..., rejected: _Optional[_Union[Side, _Mapping]] = ..., verdict: _Optional[str] = ..., annotator: _Optional[str] = ..., comment: _Optional[str] = ..., source: _Optional[str] = ...) -> None: ...

class ListPreferencesRequest(_message.Message):
    __slots__ = ("after", "limit", "order", "annotator")
    AFTER_FIELD_NUMBER: _ClassVar[int]
    LIMIT_FIELD_NUMBER: _ClassVar[int]
    ORDER_FIELD_NUMBER: _ClassVar[int]
    ANNOTATOR_FIELD_NUMBER: _ClassVar[int]
    after: str
    limit: int
    order: str
    annotator: str
    def __init__(self, after: _Optional[str] = ..., limit: _Optional[int] = ..., order: _Optional[str] = ..., annotator: _Optional[str] = ...) -> None: ...

class ListPreferencesResponse(_message.Message):
    __slots__ = ("data", "first_id", "last_id", "has_more")
    DATA_FIELD_NUMBER: _ClassVar[int]
    FIRST_ID_FIELD_NUMBER: _ClassVar[int]
    LAST_ID_FIELD_NUMBER: _ClassVar[int]
    HAS_MORE_FIELD_NUMBER: _ClassVar[int]
    data: _containers.RepeatedCompositeFieldContainer[Preference]
    first_id: str
    last_id: str
    has_more: bool
    def __init__(self, data: _Optional[_Iterable[_Union[Preference, _Mapping]]] = ..., first_id: _Optional[str] = ..., last_id: _Optional[str] = ..., has_more: _Optional[bool] = ...) -> None: ...

class DeletePreferenceRequest(_message.Message):
    __slots__ = ("id",)
    ID_FIELD_NUMBER: _ClassVar[int]
    id: str
    def __init__(self, id: _Optional[str] = ...) -> None: ...

class DeleteFeedbackRequest(_message.Message):
    __slots__ = ("id",)
    ID_FIELD_NUMBER: _ClassVar[int]
    id: str
    def __init__(self, id: _Optional[str] = ...) -> None: ...

class DeleteResponse(_message.Message):
    __slots__ = ("id", "object", "deleted")
    ID_FIELD_NUMBER: _ClassVar[int]
    OBJECT_FIELD_NUMBER: _ClassVar[int]
    DELETED_FIELD_NUMBER: _ClassVar[int]
    id: str
    object: str
    deleted: bool
    def __init__(self, id: _Optional[str] = ..., object: _Optional[str] = ..., deleted: _Optional[bool] = ...) -> None: ...

class RecordFeedbackRequest(_message.Message):
    __slots__ = ("completion_id", "index", "rating", "thumb", "edit", "comment", "annotator")
    COMPLETION_ID_FIELD_NUMBER: _ClassVar[int]
    INDEX_FIELD_NUMBER: _ClassVar[int]
    RATING_FIELD_NUMBER: _ClassVar[int]
    THUMB_FIELD_NUMBER: _ClassVar[int]
    EDIT_FIELD_NUMBER: _ClassVar[int]
    COMMENT_FIELD_NUMBER: _ClassVar[int]
    ANNOTATOR_FIELD_NUMBER: _ClassVar[int]
    completion_id: str
    index: int
    rating: int
    thumb: str
    edit: str
    comment: str
    annotator: str
    def __init__(self, completion_id: _Optional[str] = ..., index: _Optional[int] = ..., rating: _Optional[int] = ..., thumb: _Optional[str] = ..., edit: _Optional[str] = ..., comment: _Optional[str] = ..., annotator: _Optional[str] = ...) -> None: ...

class Feedback(_message.Message):
    __slots__ = ("id", "object", "created_at", "completion_id", "index", "rating", "thumb", "edit", "comment", "annotator", "preference_id")
    ID_FIELD_NUMBER: _ClassVar[int]
    OBJECT_FIELD_NUMBER: _ClassVar[int]
    CREATED_AT_FIELD_NUMBER: _ClassVar[int]
    COMPLETION_ID_FIELD_NUMBER: _ClassVar[int]
    INDEX_FIELD_NUMBER: _ClassVar[int]
    RATING_FIELD_NUMBER: _ClassVar[int]
    THUMB_FIELD_NUMBER: _ClassVar[int]
    EDIT_FIELD_NUMBER: _ClassVar[int]
    COMMENT_FIELD_NUMBER: _ClassVar[int]
    ANNOTATOR_FIELD_NUMBER: _ClassVar[int]
    PREFERENCE_ID_FIELD_NUMBER: _ClassVar[int]
    id: str
    object: str
    created_at: float
    completion_id: str
    index: int
    rating: int
    thumb: str
    edit: str
    comment: str
    annotator: str
    preference_id: str
    def __init__(self, id: _Optional[str] = ..., object: _Optional[str] = ..., created_at: _Optional[float] = ..., completion_id: _Optional[str] = ..., index: _Optional[int] = ..., rating: _Optional[int] = ..., thumb: _Optional[str] = ..., edit: _Optional[str] = ..., comment: _Optional[str] = ..., annotator: _Optional[str] = ..., preference_id: _Optional[str] = ...) -> None: ...

class ListFeedbackRequest(_message.Message):
    __slots__ = ("after", "limit", "order", "annotator", "completion_id")
    AFTER_FIELD_NUMBER: _ClassVar[int]
    LIMIT_FIELD_NUMBER: _ClassVar[int]
    ORDER_FIELD_NUMBER: _ClassVar[int]
    ANNOTATOR_FIELD_NUMBER: _ClassVar[int]
    COMPLETION_ID_FIELD_NUMBER: _ClassVar[int]
    after: str
    limit: int
    order: str
    annotator: str
    completion_id: str
    def __init__(self, after: _Optional[str] = ..., limit: _Optional[int] = ..., order: _Optional[str] = ..., annotator: _Optional[str] = ..., completion_id: _Optional[str] = ...) -> None: ...

class ListFeedbackResponse(_message.Message):
    __slots__ = ("data", "first_id", "last_id", "has_more")
    DATA_FIELD_NUMBER: _ClassVar[int]
    FIRST_ID_FIELD_NUMBER: _ClassVar[int]
    LAST_ID_FIELD_NUMBER: _ClassVar[int]
    HAS_MORE_FIELD_NUMBER: _ClassVar[int]
    data: _containers.RepeatedCompositeFieldContainer[Feedback]
    first_id: str
    last_id: str
    has_more: bool
    def __init__(self, data: _Optional[_Iterable[_Union[Feedback, _Mapping]]] = ..., first_id: _Optional[str] = ..., last_id: _Optional[str] = ..., has_more: _Optional[bool] = ...) -> None: ...

class ForgetEndUserRequest(_message.Message):
    __slots__ = ("user",)
    USER_FIELD_NUMBER: _ClassVar[int]
    user: str
    def __init__(self, user: _Optional[str] = ...) -> None: ...

class ForgetEndUserResponse(_message.Message):
    __slots__ = ("id", "object", "deleted", "completions", "choices", "preferences", "feedback", "images", "lineage")
    ID_FIELD_NUMBER: _ClassVar[int]
    OBJECT_FIELD_NUMBER: _ClassVar[int]
    DELETED_FIELD_NUMBER: _ClassVar[int]
    COMPLETIONS_FIELD_NUMBER: _ClassVar[int]
    CHOICES_FIELD_NUMBER: _ClassVar[int]
    PREFERENCES_FIELD_NUMBER: _ClassVar[int]
    FEEDBACK_FIELD_NUMBER: _ClassVar[int]
    IMAGES_FIELD_NUMBER: _ClassVar[int]
    LINEAGE_FIELD_NUMBER: _ClassVar[int]
    id: str
    object: str
    deleted: bool
    completions: int
    choices: int
    preferences: int
    feedback: int
    images: int
    lineage: ForgottenLineage
    def __init__(self, id: _Optional[str] = ..., object: _Optional[str] = ..., deleted: _Optional[bool] = ..., completions: _Optional[int] = ..., choices: _Optional[int] = ..., preferences: _Optional[int] = ..., feedback: _Optional[int] = ..., images: _Optional[int] = ..., lineage: _Optional[_Union[ForgottenLineage, _Mapping]] = ...) -> None: ...

class ForgottenLineage(_message.Message):
    __slots__ = ("versions", "inherited", "jobs")
    VERSIONS_FIELD_NUMBER: _ClassVar[int]
    INHERITED_FIELD_NUMBER: _ClassVar[int]
    JOBS_FIELD_NUMBER: _ClassVar[int]
    versions: _containers.RepeatedCompositeFieldContainer[ForgottenUse]
    inherited: _containers.RepeatedScalarFieldContainer[str]
    jobs: _containers.RepeatedCompositeFieldContainer[ForgottenUse]
    def __init__(self, versions: _Optional[_Iterable[_Union[ForgottenUse, _Mapping]]] = ..., inherited: _Optional[_Iterable[str]] = ..., jobs: _Optional[_Iterable[_Union[ForgottenUse, _Mapping]]] = ...) -> None: ...

class ForgottenUse(_message.Message):
    __slots__ = ("version", "state", "job", "uses")
    class UsesEntry(_message.Message):
        __slots__ = ("key", "value")
        KEY_FIELD_NUMBER: _ClassVar[int]
        VALUE_FIELD_NUMBER: _ClassVar[int]
        key: str
        value: int
        def __init__(self, key: _Optional[str] = ..., value: _Optional[int] = ...) -> None: ...
    VERSION_FIELD_NUMBER: _ClassVar[int]
    STATE_FIELD_NUMBER: _ClassVar[int]
    JOB_FIELD_NUMBER: _ClassVar[int]
    USES_FIELD_NUMBER: _ClassVar[int]
    version: str
    state: str
    job: str
    uses: _containers.ScalarMap[str, int]
    def __init__(self, version: _Optional[str] = ..., state: _Optional[str] = ..., job: _Optional[str] = ..., uses: _Optional[_Mapping[str, int]] = ...) -> None: ...
