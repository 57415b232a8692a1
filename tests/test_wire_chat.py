import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from openai.types.chat import (
    ChatCompletionAssistantMessageParam,
    ChatCompletionContentPartTextParam,
    ChatCompletionDeveloperMessageParam,
    ChatCompletionMessage,
    ChatCompletionSystemMessageParam,
    ChatCompletionUserMessageParam,
)
from openai.types.chat.completion_create_params import (
    CompletionCreateParamsNonStreaming,
    CompletionCreateParamsStreaming,
)
from pydantic import BaseModel

from charloom.params import SamplingParams
from service import frames
from service.errors import RequestError
from service.messages import Accepted, Delta, Ended, Judged, Submit
from service.settings import Settings
from service.web.body import check, dump
from service.web.wire.chat import ChatCompletion, ChatReply, ChatRequest, Message, TextPart, join
from service.web.wire.errors import envelope

SETTINGS = Settings(logprobs=20)

USER = [{"role": "user", "content": "To be"}]

NEUTRAL = [
    ("function_call", "none"),
    ("function_call", "auto"),
    ("functions", []),
    ("metadata", {}),
    ("modalities", ["text"]),
    ("parallel_tool_calls", True),
    ("parallel_tool_calls", False),
    ("prompt_cache_options", {}),
    ("prompt_cache_options", {"mode": "implicit"}),
    ("prompt_cache_retention", "in_memory"),
    ("reasoning_effort", "none"),
    ("service_tier", "auto"),
    ("service_tier", "default"),
    ("store", False),
    ("tool_choice", "none"),
    ("tool_choice", "auto"),
    ("tools", []),
    ("verbosity", "medium"),
]
"""Published values that ask for nothing beyond a text."""

UNSUPPORTED = [
    ("audio", {"voice": "x", "format": "wav"}),
    ("function_call", {"name": "x"}),
    ("functions", [{"name": "x"}]),
    ("metadata", {"a": "b"}),
    ("modalities", ["text", "audio"]),
    ("modalities", []),
    ("moderation", {"model": "x"}),
    ("prediction", {"type": "content", "content": "x"}),
    ("prompt_cache_options", {"mode": "explicit"}),
    ("prompt_cache_options", {"ttl": "30m"}),
    ("prompt_cache_retention", "24h"),
    ("reasoning_effort", "low"),
    ("service_tier", "flex"),
    ("store", True),
    ("tool_choice", "required"),
    ("tools", [{"type": "function", "function": {"name": "x"}}]),
    ("tools", {}),
    ("verbosity", "low"),
    ("web_search_options", {}),
]
"""Published fields that ask for what no character model does."""


def order(settings: Settings = SETTINGS, template: str | None = None, **body: Any) -> Submit:
    """What a body comes to; `template` is the model's own."""
    given = check(ChatRequest, {"model": "demo", "messages": USER, **body})
    return given.to_submit(settings, "me", template)


def refused(**body: Any) -> tuple[str | None, str]:
    """The field and the message with which a body is refused."""
    with pytest.raises(RequestError) as caught:
        order(**body)
    assert caught.value.problem.status == 400
    return caught.value.problem.param, caught.value.problem.message


# Requests


def test_messages_become_lines() -> None:
    """Without a template each message is a line of the prompt, and the defaults are the core's."""
    messages = [
        {"role": "system", "content": "one"},
        {
            "role": "user",
            "content": [{"type": "text", "text": "t"}, {"type": "text", "text": "wo"}],
        },
        {"role": "assistant", "content": "", "refusal": None, "tool_calls": None},
    ]
    found = order(messages=messages)
    assert found.prompts == ["one\ntwo\n\n"]
    assert found.params == SamplingParams()


def test_the_models_template_goes_before_lines_and_the_settings_before_both() -> None:
    """Who runs the service has the last word about its prompts."""
    assert order(template="<{role}> {content}|").prompts == ["<user> To be|"]
    settings = Settings(chat_template="{role}: {content}; ")
    assert order(settings, template="<{role}>{content}").prompts == ["user: To be; "]


@pytest.mark.parametrize(
    ("template", "prompt"),
    [
        ("{content}", "To be"),
        ("{{{role}}} {content}\n", "{user} To be\n"),
        ("{content}{content}", "To beTo be"),
    ],
)
def test_templates_are_texts_around_two_names(template: str, prompt: str) -> None:
    """Double braces stand for braces, as in str.format."""
    assert order(template=template).prompts == [prompt]


def test_the_joined_prompt_is_bounded() -> None:
    """A template that repeats the messages makes no prompt larger than a body may be."""
    messages = [Message(role="user", content="x" * 40)] * 2
    assert len(join(messages, "{content}" * 10, 800)) == 800
    with pytest.raises(RequestError, match="800 characters; give at most 799"):
        join(messages, "{content}" * 10, 799)


@given(st.text(alphabet="{}ab!:.[]"), st.text(alphabet="{}ab!:.[]"))
def test_messages_are_never_taken_for_templates(content: str, role: str) -> None:
    """Braces in a message stay what they are."""
    template = f"{role.replace('{', '{{').replace('}', '}}')}{{content}}"
    assert join([Message(role="user", content=content)], template, 1000) == role + content


@pytest.mark.parametrize(
    "body",
    [
        {"max_tokens": 3},
        {"max_completion_tokens": 3},
        {"max_tokens": 3, "max_completion_tokens": 3},
    ],
)
def test_max_tokens_has_two_names(body: dict[str, int]) -> None:
    """The newer name means the same."""
    assert order(**body).params.max_tokens == 3


def test_logprobs_are_a_switch_and_a_number() -> None:
    """Chat asks for alternatives apart from the tokens' own log-probabilities."""
    assert order().params.logprobs is None
    assert order(logprobs=False).params.logprobs is None
    assert order(logprobs=True).params.logprobs == 0
    assert order(logprobs=True, top_logprobs=20).params.logprobs == 20


def test_options_are_those_of_completions() -> None:
    """The extras have the same names here."""
    found = order(temperature=0, top_k=3, n=2, seed=0, stop="x", logit_bias={"5": 1}, stream=True)
    assert found.is_streamed
    assert found.params == SamplingParams(
        temperature=0.0, top_k=3, n=2, seed=0, stop=("x",), logit_bias={5: 1.0}
    )


@pytest.mark.parametrize("name", sorted(set(ChatRequest.model_fields) - {"model", "messages"}))
def test_null_means_not_given(name: str) -> None:
    """Clients send null for what they leave out."""
    assert order(**{name: None}) == order()


def test_what_only_names_the_user_is_taken() -> None:
    """Text is the one form there is, and the user's names change nothing."""
    assert order() == order(
        response_format={"type": "text"},
        user="someone",
        safety_identifier="someone",
        prompt_cache_key="some",
    )


@pytest.mark.parametrize(("name", "value"), UNSUPPORTED)
def test_what_no_character_model_does_is_refused_by_name(name: str, value: object) -> None:
    """A published field without a meaning here is not passed over."""
    param, message = refused(**{name: value})
    assert param == name
    assert "does not support" in message


@pytest.mark.parametrize(("name", "value"), NEUTRAL)
def test_what_asks_for_nothing_is_taken(name: str, value: object) -> None:
    """Clients that send a field's neutral value write the same text as those that leave it out."""
    assert order(**{name: value}) == order()


@pytest.mark.parametrize("name", ["store", "tools", "metadata", "service_tier", "verbosity"])
@pytest.mark.parametrize("value", [0, "", "x", [[]], [0], {"": None}])
def test_what_only_resembles_a_neutral_value_is_refused(name: str, value: object) -> None:
    """Types are exact here too."""
    assert refused(**{name: value})[0] == name


def test_an_answer_may_be_sent_back_as_a_message() -> None:
    """Clients put what they were given, with its empty fields, into the next request."""
    given = ChatCompletionMessage(
        role="assistant", content="x", refusal=None, annotations=[], tool_calls=[]
    )
    assert order(messages=[given.model_dump()]).prompts == ["x\n"]


def test_null_is_an_empty_text_of_the_assistants() -> None:
    """OpenAI's own answers may have no content; what a user or a system says has some."""
    assert order(messages=[{"role": "assistant", "content": None}]).prompts == ["\n"]
    for role in ("developer", "system", "user"):
        assert refused(messages=[{"role": role, "content": None}]) == (
            "messages.0.content",
            "messages.0.content is null; give a text or a list.",
        )


def test_a_speakers_name_changes_nothing() -> None:
    """Templates know roles only."""
    assert order(messages=[{**USER[0], "name": "x"}]) == order()


@pytest.mark.parametrize(
    ("model", "published"),
    [
        (ChatRequest, (CompletionCreateParamsNonStreaming, CompletionCreateParamsStreaming)),
        (
            Message,
            (
                ChatCompletionAssistantMessageParam,
                ChatCompletionDeveloperMessageParam,
                ChatCompletionSystemMessageParam,
                ChatCompletionUserMessageParam,
            ),
        ),
        (TextPart, (ChatCompletionContentPartTextParam,)),
    ],
)
def test_all_published_fields_are_known(
    model: type[BaseModel], published: tuple[type, ...]
) -> None:
    """Each field of OpenAI's types is read or refused by name, never taken for a misspelling."""
    assert set(model.model_fields) >= {name for form in published for name in form.__annotations__}


@pytest.mark.parametrize(
    ("body", "param"),
    [
        ({"messages": []}, "messages"),
        ({"messages": "To be"}, "messages"),
        ({"messages": None}, "messages"),
        ({"messages": ["To be"]}, "messages.0"),
        ({"messages": [{"role": "user"}]}, "messages.0.content"),
        ({"messages": [{"content": "x"}]}, "messages.0.role"),
        ({"messages": [{"role": "user", "content": None}]}, "messages.0.content"),
        ({"messages": [{"role": "tool", "content": "x"}]}, "messages.0.role"),
        ({"messages": [{"role": "assistant"}]}, "messages.0.content"),
        ({"messages": [{**USER[0], "name": 1}]}, "messages.0.name"),
        ({"messages": [*USER, {**USER[0], "tool_calls": [{}]}]}, "messages.1.tool_calls"),
        ({"messages": [{**USER[0], "annotations": [{}]}]}, "messages.0.annotations"),
        ({"messages": [{**USER[0], "weight": 1}]}, "messages.0.weight"),
        (
            {"messages": [{"role": "user", "content": [{"type": "image_url", "text": "x"}]}]},
            "messages.0.content.0.type",
        ),
        ({"messages": USER * 2049}, "messages"),
        ({"response_format": {"type": "json_object"}}, "response_format.type"),
        ({"top_logprobs": 3}, "top_logprobs"),
        ({"logprobs": True, "top_logprobs": 21}, "top_logprobs"),
        ({"logprobs": True, "top_logprobs": -1}, "top_logprobs"),
        ({"logprobs": 3}, "logprobs"),
        ({"max_completion_tokens": -1}, "max_completion_tokens"),
        ({"max_completion_tokens": 3, "max_tokens": 4}, "max_completion_tokens"),
        ({"prompt": "x"}, "prompt"),
        ({"best_of": 2}, "best_of"),
        ({"echo": True}, "echo"),
    ],
)
def test_what_is_wrong_is_named(body: dict[str, Any], param: str) -> None:
    """The path leads to the field that was given, whatever it is called inside."""
    assert refused(**body)[0] == param


values = st.recursive(
    st.none() | st.booleans() | st.integers(-1, 30) | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=3), inner),
    max_leaves=6,
)
messages = st.lists(
    st.fixed_dictionaries(
        {"role": st.sampled_from(["user", "system", "tool"])},
        optional={"content": st.text() | values, "name": values},
    )
    | values,
    max_size=3,
)


@given(
    st.dictionaries(
        st.sampled_from(sorted(ChatRequest.model_fields)) | st.text(max_size=5), values, max_size=5
    ),
    messages | values,
)
def test_any_body_is_an_order_or_a_refusal(body: dict[str, object], said: object) -> None:
    """Nothing that JSON can hold raises anything else, and both can be sent on."""
    try:
        found = check(ChatRequest, {"messages": said, **body}).to_submit(SETTINGS, "me", None)
    except RequestError as error:
        dump(envelope(error.problem))
    else:
        frames.encode(found)


# Answers

ACCEPTED = Accepted(
    id=1,
    created=1795186800,
    model="demo",
    fingerprint="0123456789abcdef" * 4,
    precision="float32",
    seed=99,
    prompt_tokens=5,
)
ENDED = Ended(id=1, completion_tokens=7)


def reply(*, logprobs: bool = False, usage: bool = False) -> ChatReply:
    """The form of an answer."""
    return ChatReply(ACCEPTED, wants_logprobs=logprobs, wants_usage=usage)


def written(value: object) -> Any:
    """A body as a client reads it."""
    return json.loads(dump(value))


def test_an_answer_has_the_published_shape() -> None:
    """Every key of OpenAI's, and ours beside them."""
    text = Delta(id=1, index=0, text="ab", tokens=7, finish="stop", stop_reason="x")
    found = written(reply().whole([text], ENDED))
    assert found.pop("id").startswith("chatcmpl-")
    assert found == {
        "object": "chat.completion",
        "created": 1795186800,
        "model": "demo",
        "system_fingerprint": "fp_0123456789abcdef_float32",
        "seed": 99,
        "choices": [
            {
                "index": 0,
                "message": {"role": "assistant", "content": "ab", "refusal": None},
                "logprobs": None,
                "finish_reason": "stop",
                "stop_reason": "x",
            }
        ],
        "usage": {
            "prompt_tokens": 5,
            "completion_tokens": 7,
            "total_tokens": 12,
            "prompt_tokens_details": {"cached_tokens": 0},
        },
    }


def test_the_first_chunk_of_each_choice_has_the_role() -> None:
    """Once for each choice, together with its first text."""
    form = reply()
    found = [
        written(form.choice(Delta(id=1, index=index, text=text, tokens=1)))
        for index, text in [(0, "a"), (1, "b"), (0, "c"), (1, "")]
    ]
    assert [choice["delta"] for choice in found] == [
        {"content": "a", "role": "assistant"},
        {"content": "b", "role": "assistant"},
        {"content": "c"},
        {"content": ""},
    ]
    assert written(form.frame())["object"] == "chat.completion.chunk"


def test_chunks_have_usage_only_where_it_was_asked_for() -> None:
    """Without the wish there is no such key; with it, null and a last chunk without choices."""
    assert "usage" not in written(reply().frame())
    asked = reply(usage=True)
    assert written(asked.frame())["usage"] is None
    last = written(asked.last(ENDED))
    assert (last["choices"], last["usage"]["total_tokens"]) == ([], 12)


def test_logprobs_have_chats_own_shape() -> None:
    """A list of tokens with their bytes, and OpenAI's number where there is no score."""
    judged = Judged(
        tokens=["é", "b"], ids=[1, 2], logprobs=[None, -0.5], top=[None, [("b", -0.5), ("c", -1.0)]]
    )
    delta = Delta(id=1, index=0, text="éb", tokens=2, judged=judged)
    assert written(reply(logprobs=True).choice(delta))["logprobs"] == {
        "content": [
            {"token": "é", "logprob": -9999.0, "bytes": [195, 169], "top_logprobs": []},
            {
                "token": "b",
                "logprob": -0.5,
                "bytes": [98],
                "top_logprobs": [
                    {"token": "b", "logprob": -0.5, "bytes": [98]},
                    {"token": "c", "logprob": -1.0, "bytes": [99]},
                ],
            },
        ],
        "refusal": None,
    }
    silent = Delta(id=1, index=0, text="", tokens=0)
    assert written(reply(logprobs=True).choice(silent))["logprobs"]["content"] == []


def test_an_answer_is_what_the_document_says() -> None:
    """The body of an answer passes its own model, which the document shows."""
    delta = Delta(id=1, index=0, text="a", tokens=1, finish="length")
    ChatCompletion.model_validate_json(dump(reply(logprobs=True).whole([delta], ENDED)))
