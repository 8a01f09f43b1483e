"""A record that is scrubbed holds nothing that gives the text back, and says truly what it is."""

from __future__ import annotations

import json

from noria.records import BLOB_SCHEME, Completion
from noria.settings import PrivacySettings
from serve.capture.record import prompt_hash
from serve.privacy.scrub import Scrubber
from tests.unit.store.samples import completion

REFERENCE = BLOB_SCHEME + "4111111111111111" * 4  # digits that read like cards


def scrubber(**given: object) -> Scrubber:
    return Scrubber(PrivacySettings.model_validate({"redact": ["email", "card"], **given}))


def asked(**changes: object) -> Completion:
    shown = {"type": "image_url", "image_url": {"url": REFERENCE}}
    text = {"type": "text", "text": "I am jane@x.org"}
    made: dict[str, object] = {
        "messages": ({"role": "user", "content": [text, shown]},),
        "metadata": {"who": "joe@x.org", "page": "3"},
        "params": {"temperature": 1.0, "stop": ["jane@x.org"]},
    }
    return completion("c1", ("hello jane@x.org", "hello"), **{**made, **changes})


def test_a_changed_prompt_and_a_changed_answer_lose_their_tokens() -> None:
    one = scrubber()
    kept = one.completion(asked())
    content = kept.messages[0]["content"]
    assert content == [{"type": "text", "text": "I am <EMAIL>"}, {"type": "image_url", "image_url": {"url": REFERENCE}}]
    first, second = kept.choices
    assert (first.text, first.message["content"]) == ("hello <EMAIL>", "hello <EMAIL>")
    assert (first.token_ids, first.logprobs, kept.prompt_token_ids) == ((), (), ())
    assert second == asked().choices[1]
    assert second.token_ids
    assert kept.metadata == {"who": "<EMAIL>", "page": "3"}
    assert kept.params == {"temperature": 1.0, "stop": ["<EMAIL>"]}
    assert kept.prompt_hash == prompt_hash(list(kept.messages))
    assert one.redacted == {"email": 4, "card": 0}
    assert kept.end_user == asked().end_user


def test_words_that_begin_like_an_address_of_a_picture_are_words() -> None:
    said = ("data: jane@x.org", "data:,jane@x.org", f"{BLOB_SCHEME}jane@x.org")
    kept = scrubber().completion(asked(messages=tuple({"role": "user", "content": one} for one in said)))
    assert [one["content"] for one in kept.messages] == [one.replace("jane@x.org", "<EMAIL>") for one in said]


def test_a_property_called_id_is_read_like_any_other() -> None:
    properties = {name: {"type": "string", "default": "jane@x.org"} for name in ("id", "role", "type", "who")}
    tools = [{"type": "function", "function": {"name": "find", "parameters": {"properties": properties}}}]
    assert "jane" not in str(scrubber().completion(asked(params={"tools": tools})))


def test_what_is_clean_stays_as_it_is() -> None:
    clean = completion()
    assert scrubber().completion(clean) == clean


def test_reasoning_and_tool_calls_are_redacted_too() -> None:
    call = {"id": "call_1", "type": "function", "function": {"name": "mail", "arguments": '{"to":"jane@x.org"}'}}
    one = completion("c1", ("",))
    message = {"role": "assistant", "content": None, "reasoning": "ask jane@x.org", "tool_calls": [call]}
    kept = scrubber().completion(
        Completion(**{**vars(one), "choices": (type(one.choices[0])(**{**vars(one.choices[0]), "message": message}),)})
    )
    assert "jane" not in str(kept.choices)
    assert kept.choices[0].message["tool_calls"][0]["function"]["arguments"] == '{"to":"<EMAIL>"}'
    assert kept.choices[0].token_ids == ()


def test_a_tool_call_s_arguments_stay_json() -> None:
    """`\\njane@x.org` in JSON: the address must not take the letter of the escape along."""
    said = {"body": "Hello\njane@x.org", "to": "j\u00e4ne@x.org", "jane@x.org": 4111111111111111}
    call = {"id": "call_1", "type": "function", "function": {"name": "mail", "arguments": json.dumps(said)}}
    kept = scrubber().completion(asked(messages=({"role": "assistant", "content": None, "tool_calls": [call]},)))
    arguments = kept.messages[0]["tool_calls"][0]["function"]["arguments"]
    assert arguments == '{"body":"Hello\\n<EMAIL>","to":"<EMAIL>","<EMAIL>":<CARD>}'


def test_metadata_is_cut_to_the_allowed_keys_and_counted() -> None:
    one = scrubber(redact=[], metadata_keys=["page"])
    assert one.completion(asked()).metadata == {"page": "3"}
    assert one.metadata({"a": "1", "b": "2"}) == {}
    assert one.metadata_dropped == 3
    assert scrubber(redact=[], metadata_keys=[]).metadata({"a": "1"}) == {}
    assert scrubber(redact=[]).metadata({"a": "1"}) == {"a": "1"}
