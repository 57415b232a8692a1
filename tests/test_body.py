import io
import json
import socket
import threading
import time
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Annotated, Any

import pytest
from flask import Flask, Response
from flask.testing import FlaskClient
from gunicorn import http
from gunicorn.config import Config
from gunicorn.http import wsgi
from hypothesis import example, given
from hypothesis import strategies as st
from pydantic import BaseModel, ConfigDict, Field

from service.errors import RequestError
from service.settings import Settings
from service.web import context
from service.web.body import NODE_LIMIT, OBJECT_LIMIT, check, dump, parse, with_body
from service.web.deadline import DeadlineSocket
from service.web.wire.errors import envelope

DEPTH = 16


class Leaf(BaseModel):
    """A nested object."""

    model_config = ConfigDict(extra="forbid", strict=True)

    size: Annotated[int, Field(ge=1, le=9)]


class Probe(BaseModel):
    """A body with a field of each kind."""

    model_config = ConfigDict(extra="forbid", strict=True)

    name: Annotated[str, Field(min_length=1, max_length=9)]
    count: int | None = None
    ratio: float | None = None
    loud: bool | None = None
    stop: str | list[str] | None = None
    leaves: list[Leaf] | None = None
    gone: None = None


def adopt(accepted: socket.socket) -> DeadlineSocket:
    """Take over the connection of another socket, which is closed by that."""
    return DeadlineSocket(accepted.family, accepted.type, accepted.proto, accepted.detach())


def refused(data: bytes, *, depth: int = DEPTH) -> tuple[str | None, str]:
    """The field and the message with which a JSON text is refused."""
    with pytest.raises(RequestError) as caught:
        check(Probe, parse(data, depth=depth))
    assert caught.value.problem.status == 400
    return caught.value.problem.param, caught.value.problem.message


# JSON in


@pytest.mark.parametrize(
    ("text", "words"),
    [
        (b"", "empty"),
        (b" \n", "empty"),
        (b"{", "not JSON"),
        (b"{'name': 'x'}", "not JSON"),
        (b'{"name": "x"} {}', "not JSON"),
        (b"\xff", "not UTF-8"),
        (b'{"name": "\xed\xa0\x80"}', "not UTF-8"),
        ('{"name": "x"}'.encode("utf-16"), "not UTF-8"),
        (b'{"ratio": NaN}', "NaN"),
        (b'{"ratio": Infinity}', "Infinity"),
        (b'{"ratio": -Infinity}', "-Infinity"),
        (b'{"ratio": 1e999}', "1e999"),
        (b'{"count": ' + b"9" * 5000 + b"}", "4300 digits"),
        (b"[]", "object"),
        (b"null", "object"),
        (b'"name"', "object"),
    ],
)
def test_what_is_no_json_object_is_refused_with_a_sentence(text: bytes, words: str) -> None:
    """A body that is not an object of standard JSON is refused, and no field is blamed."""
    param, message = refused(text)
    assert param is None
    assert words in message
    assert message.endswith(".")


def test_a_key_given_twice_is_refused_by_name() -> None:
    """Of two readers in a row each might take another of the two values."""
    param, message = refused(b'{"name": "x", "name": "y"}')
    assert param == "name"
    assert "twice" in message


@pytest.mark.parametrize(
    ("text", "path"),
    [
        (b'{"name": "\\ud800"}', "name"),
        (b'{"name": "x", "stop": ["a", "\\udc00b"]}', "stop.1"),
        (b'{"name": "x", "\\ud83d": 1}', None),
        (b'{"\\ud83d": 1, "\\ud83d": 2}', "?"),
    ],
)
def test_half_of_a_surrogate_pair_is_refused_by_its_place(text: bytes, path: str | None) -> None:
    """What no UTF-8 can carry on is refused where it stands, and can be told in an answer."""
    param, message = refused(text)
    assert param == path
    message.encode()


def test_whole_surrogate_pairs_are_characters() -> None:
    """A character beyond the basic plane may come as two escapes."""
    assert parse(b'"\\ud83d\\ude00"', depth=DEPTH) == "\N{GRINNING FACE}"


def test_a_byte_order_mark_is_passed_over() -> None:
    """One at the start is no part of the JSON text; alone it is an empty body."""
    assert parse(b'\xef\xbb\xbf{"a": 1}', depth=DEPTH) == {"a": 1}
    with pytest.raises(RequestError, match="The body is empty"):
        parse(b"\xef\xbb\xbf", depth=DEPTH)


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("5.0", 5),
        ("-5e0", -5),
        ("1.5e1", 15),
        ("9007199254740991.0", 2**53 - 1),
        ("9007199254740992.0", 2.0**53),
        ("1e300", 1e300),
        ("5.5", 5.5),
        ("1e-400", 0),
    ],
)
def test_a_whole_number_may_be_written_with_a_dot(text: str, value: float) -> None:
    """JSON knows one kind of number: what is whole is so in every spelling, as far as exact."""
    found = parse(text.encode(), depth=DEPTH)
    assert found == value
    assert type(found) is type(value)


@pytest.mark.parametrize(("opening", "closing"), [(b"[", b"]"), (b'{"a":', b"}")])
def test_nesting_is_bounded(opening: bytes, closing: bytes) -> None:
    """As deep as allowed is read, one deeper is refused, and so is what no stack could hold."""
    for depth in (1, 2, DEPTH):
        parse(opening * depth + b"1" + closing * depth, depth=depth)
        for deeper in (depth + 1, NODE_LIMIT):
            with pytest.raises(RequestError, match=f"more than {depth} deep"):
                parse(opening * deeper + b"1" + closing * deeper, depth=depth)


def test_brackets_in_strings_and_beside_each_other_do_not_nest() -> None:
    """Only what stands inside of each other counts as nested."""
    assert parse(b'["[[[[", [], {}, [], {"{{": []}]', depth=3) == ["[[[[", [], {}, [], {"{{": []}]


def test_objects_are_bounded() -> None:
    """An object of more fields than a record could be kept of is refused."""
    fields = ",".join(f'"{number}":0' for number in range(OBJECT_LIMIT + 1))
    with pytest.raises(RequestError, match=f"at most {OBJECT_LIMIT}"):
        parse(f"{{{fields}}}".encode(), depth=DEPTH)


@pytest.mark.parametrize("unit", [b"[1]", b'{"a":1}', b"[]"])
def test_lists_and_objects_are_counted_before_they_are_made(unit: bytes) -> None:
    """More of them than a request of these routes can have are refused, and as many are not."""
    most = b",".join([unit] * (NODE_LIMIT - 1))
    assert len(parse(b"[" + most + b"]", depth=DEPTH)) == NODE_LIMIT - 1
    with pytest.raises(RequestError, match=f"more than {NODE_LIMIT} lists and objects"):
        parse(b"[" + most + b"," + unit + b"]", depth=DEPTH)


def test_brackets_in_strings_do_not_count() -> None:
    """The source of a program may be continued; a quote that is escaped ends no string."""
    text = '[]{\\"\n' * NODE_LIMIT
    assert parse(json.dumps([text]).encode(), depth=DEPTH) == [text]


def test_a_string_without_an_end_is_looked_at_once() -> None:
    """Each quote in it might begin one, but none that is escaped does: a megabyte takes no time."""
    with pytest.raises(RequestError, match="is not JSON"):
        parse(b'["' + rb"[\"" * (1 << 18), depth=DEPTH)


json_values = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats(allow_nan=False, allow_infinity=False)
    # Also characters beyond the basic plane, as two escapes.
    | st.text(),
    lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner),
    max_leaves=20,
)


@given(json_values, st.booleans())
def test_what_another_encoder_writes_is_read_back(value: object, is_ascii: bool) -> None:
    """Any value that Python's encoder writes is read as it was."""
    data = json.dumps(value, ensure_ascii=is_ascii).encode()
    assert parse(data, depth=100) == value


@given(st.binary() | st.text(alphabet='{}[]":,\\0123456789.eE+-tfnaN ud8').map(str.encode))
@example(b'{"":0,"":0}')
@example(b'"\\ud800')
def test_no_bytes_raise_anything_but_a_refusal(data: bytes) -> None:
    """Whatever arrives is a value or a refusal that can be told."""
    try:
        parse(data, depth=DEPTH)
    except RequestError as error:
        dump(envelope(error.problem))


# Models


@pytest.mark.parametrize(
    ("text", "param", "message"),
    [
        ('{"name": 5}', "name", "name is 5; give a text."),
        ("{}", "name", "name is missing; give it."),
        ('{"name": "x", "count": "5"}', "count", 'count is "5"; give a whole number.'),
        ('{"name": "x", "count": 5.5}', "count", "count is 5.5; give a whole number."),
        ('{"name": ""}', "name", 'name is ""; give 1 or more characters.'),
        ('{"name": "abcdefghij"}', "name", 'name is "abcdefghij"; give up to 9 characters.'),
        ('{"name": "x", "count": true}', "count", "count is true; give a whole number."),
        ('{"name": "x", "ratio": []}', "ratio", "ratio is a list of 0; give a number."),
        ('{"name": "x", "loud": 1}', "loud", "loud is 1; give true or false."),
        ('{"name": "x", "stop": {}}', "stop", "stop is an object of 0; give a text or a list."),
        ('{"name": "x", "stop": ["a", 1]}', "stop.1", "stop.1 is 1; give a text."),
        ('{"name": "x", "gone": 0}', "gone", "gone is 0; this service does not support it"),
        ('{"name": "x", "leaves": [7]}', "leaves.0", "leaves.0 is 7; give an object."),
        ('{"name": "x", "leaves": [{}]}', "leaves.0.size", "leaves.0.size is missing; give it."),
        ('{"name": "x", "leaves": [{"size": 0}]}', "leaves.0.size", "give at least 1."),
        ('{"name": "x", "cuont": 1}', "cuont", "leave it out, or do you mean count?"),
        ('{"name": "x", "zzz": 1}', "zzz", "zzz is no field of this request; leave it out."),
    ],
)
def test_a_wrong_field_is_named_with_its_value_and_the_remedy(
    text: str, param: str, message: str
) -> None:
    """Each kind of mistake gets a sentence of its own, and `param` is its dotted path."""
    found = refused(text.encode())
    assert found[0] == param
    assert message in found[1]


def test_all_problems_are_told_and_the_first_is_the_param() -> None:
    """A body with several mistakes is refused once, for all of them."""
    param, message = refused(b'{"name": 1, "count": "x", "zzz": 2}')
    assert param == "name"
    assert message == (
        'name is 1; give a text. count is "x"; give a whole number. '
        "zzz is no field of this request; leave it out."
    )


def test_a_flood_of_problems_is_cut() -> None:
    """A few problems are told, the others counted, and long names and values are cut."""
    fields = {f"{number:0>200}": 0 for number in range(2_000)}
    _, message = refused(json.dumps({"name": "x", **fields}).encode())
    assert "1992 more problems" in message
    assert len(message) < 2000
    _, message = refused(json.dumps({"name": "x", "count": "long" * 1000}).encode())
    assert len(message) < 200


@given(json_values)
def test_no_value_breaks_the_check(value: object) -> None:
    """Any value is the model's, or refused in words that can be told."""
    try:
        check(Probe, value)
    except RequestError as error:
        dump(envelope(error.problem))


# JSON out


def test_answers_are_strict_json() -> None:
    """What is not finite becomes null, and half of a surrogate pair is never written."""
    assert dump({"a": [float("nan"), float("inf"), 1.5]}) == b'{"a":[null,null,1.5]}'
    with pytest.raises(UnicodeEncodeError):
        dump("\ud800")


def test_models_are_written_in_the_order_of_their_fields() -> None:
    """A model is an object of all its fields, nested ones included."""
    probe = Probe(name="é", leaves=[Leaf(size=3)])
    assert (
        dump(probe)
        == (
            '{"name":"é","count":null,"ratio":null,"loud":null,"stop":null,'
            '"leaves":[{"size":3}],"gone":null}'
        ).encode()
    )


def test_what_has_no_form_in_json_is_a_defect() -> None:
    """A value that is neither data nor a model is not written in some form or other."""
    with pytest.raises(TypeError, match="SimpleNamespace"):
        dump(SimpleNamespace())


# Bodies of requests


def make_app(**options: Any) -> Flask:
    """An application with one route, which answers with the body it was sent."""
    settings = Settings(**options)
    app = Flask("probe")
    app.extensions[context.NAME] = SimpleNamespace(settings=settings)

    @app.post("/probe")
    @with_body
    def probe(body: Probe) -> Response:
        return Response(dump(body), content_type="application/json")

    @app.errorhandler(RequestError)
    def refuse(error: RequestError) -> Response:
        return Response(dump(envelope(error.problem)), error.problem.status)

    return app


@pytest.fixture
def client() -> FlaskClient:
    """A client of an application with small limits."""
    return make_app(body_limit=100, json_depth=4).test_client()


def test_a_body_is_read_as_its_model(client: FlaskClient) -> None:
    """A route gets the body that it declares."""
    answer = client.post("/probe", json={"name": "x", "ratio": 1})
    assert answer.status_code == 200
    assert answer.json is not None
    assert answer.json["ratio"] == 1.0


@pytest.mark.parametrize(
    "content_type",
    [
        None,
        "",
        "text/plain",
        "application/x-www-form-urlencoded",
        "multipart/form-data; boundary=x",
        "application/json; charset=latin-1",
        "application/jsonx",
    ],
)
def test_a_body_that_does_not_say_it_is_json_is_refused(
    client: FlaskClient, content_type: str | None
) -> None:
    """Anything but JSON in UTF-8 is 415, whatever it holds."""
    answer = client.post("/probe", data=b'{"name": "x"}', content_type=content_type)
    assert answer.status_code == 415
    assert "Content-Type" in answer.get_json(force=True)["error"]["message"]


@pytest.mark.parametrize(
    "content_type", ["application/json", "Application/JSON; charset=UTF-8", "application/json;"]
)
def test_json_may_say_that_it_is_utf_8(client: FlaskClient, content_type: str) -> None:
    """Case and a true charset do not matter."""
    answer = client.post("/probe", data=b'{"name": "x"}', content_type=content_type)
    assert answer.status_code == 200


def test_a_packed_body_is_refused(client: FlaskClient) -> None:
    """What would have to be unpacked first is 415."""
    answer = client.post("/probe", json={"name": "x"}, headers={"Content-Encoding": "gzip"})
    assert answer.status_code == 415


def test_a_body_as_large_as_allowed_is_read(client: FlaskClient) -> None:
    """The limit is the largest size that is served."""
    body = b'{"name": "x"}'
    answer = client.post(
        "/probe", data=body + b" " * (100 - len(body)), content_type="application/json"
    )
    assert answer.status_code == 200


def test_a_body_larger_than_allowed_is_refused_unread(client: FlaskClient) -> None:
    """The declared length is enough: 413, and not a byte is taken."""
    stream = io.BytesIO(b" " * 101)
    answer = client.post(
        "/probe", input_stream=stream, content_length=101, content_type="application/json"
    )
    assert answer.status_code == 413
    assert stream.tell() == 0


def test_the_setting_of_depth_holds(client: FlaskClient) -> None:
    """Nesting beyond the setting is refused."""
    answer = client.post("/probe", data=b"[[[[[]]]]]", content_type="application/json")
    assert answer.status_code == 400


# Over gunicorn's own parser and real sockets


Serve = Callable[..., tuple[int, dict[str, Any]]]


@pytest.fixture
def ends() -> Iterator[tuple[socket.socket, DeadlineSocket]]:
    """A client's end of a connection, and the server's."""
    near, far = socket.socketpair()
    with near, adopt(far) as adopted:
        near.settimeout(30)
        yield near, adopted


def serve(far: socket.socket, **options: Any) -> None:
    """Answer one request on a socket, as gunicorn's worker does."""
    config = Config()
    peer = ("127.0.0.1", 1)
    parsed = next(http.get_parser(config, far, peer))
    response, environ = wsgi.create(parsed, far, peer, ("127.0.0.1", 80), config)
    for item in make_app(**options)(environ, response.start_response):
        response.write(item)
    response.close()


def answer_of(near: socket.socket) -> tuple[int, dict[str, Any]]:
    """The status and the body that a client has been sent."""
    head, _, body = near.recv(65536).partition(b"\r\n\r\n")
    return int(head.split()[1]), json.loads(body)


HEAD = b"POST /probe HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
CHUNKED = HEAD + b"Transfer-Encoding: chunked\r\n\r\n"


def test_a_body_in_chunks_is_read(ends: tuple[socket.socket, DeadlineSocket]) -> None:
    """A body without a declared length ends where its chunks do."""
    near, far = ends
    near.sendall(CHUNKED + b'5\r\n{"nam\r\n8\r\ne": "x"}\r\n0\r\n\r\n')
    serve(far)
    status, body = answer_of(near)
    assert status == 200
    assert body["name"] == "x"


@pytest.mark.parametrize("is_chunked", [True, False])
def test_a_large_body_is_read_piece_by_piece(
    ends: tuple[socket.socket, DeadlineSocket], is_chunked: bool
) -> None:
    """However it comes, nothing is lost where one piece ends and the next begins."""
    near, far = ends
    data = b'{"name": "x",' + b" " * 1_000_000 + b'"count": 7}'
    size = len(data)
    framed = b"%x\r\n%b\r\n0\r\n\r\n" % (size, data) if is_chunked else data
    head = CHUNKED if is_chunked else HEAD + b"Content-Length: %d\r\n\r\n" % size
    sending = threading.Thread(target=near.sendall, args=(head + framed,))
    sending.start()
    serve(far)
    sending.join()
    status, body = answer_of(near)
    assert status == 200
    assert body["count"] == 7


def test_a_body_in_chunks_is_bounded(ends: tuple[socket.socket, DeadlineSocket]) -> None:
    """No more than the limit is taken of a body that tells no length."""
    near, far = ends
    near.sendall(CHUNKED + b"FFFFF\r\n" + b" " * 5000)  # and no end
    serve(far, body_limit=100)
    assert answer_of(near)[0] == 413


@pytest.mark.parametrize(
    "rest",
    [b'Content-Length: 50\r\n\r\n{"name":', b"Transfer-Encoding: chunked\r\n\r\n8\r\n{", CHUNKED],
)
def test_a_body_that_breaks_off_is_refused(
    ends: tuple[socket.socket, DeadlineSocket], rest: bytes
) -> None:
    """A client that closes early is told that its body has no end."""
    near, far = ends
    near.sendall(rest if rest is CHUNKED else HEAD + rest)
    near.shutdown(socket.SHUT_WR)
    serve(far)
    status, body = answer_of(near)
    assert status == 400
    assert "broke off" in body["error"]["message"]


def test_a_damaged_chunk_is_refused(ends: tuple[socket.socket, DeadlineSocket]) -> None:
    """Chunks that cannot be read are the client's mistake and no defect."""
    near, far = ends
    near.sendall(CHUNKED + b"zz\r\n")
    serve(far)
    assert answer_of(near)[0] == 400


@pytest.mark.parametrize("is_adopted", [True, False])
def test_a_body_that_does_not_come_is_given_up(is_adopted: bool) -> None:
    """A client that stops sending gets 408 after the setting's time, on any kind of socket."""
    near, plain = socket.socketpair()
    far = adopt(plain) if is_adopted else plain
    with near, far:
        near.sendall(HEAD + b'Content-Length: 50\r\n\r\n{"name":')
        serve(far, receive_timeout=0.05)
        status, body = answer_of(near)
        assert status == 408
        assert "0.05 seconds" in body["error"]["message"]
        assert far.gettimeout() is None


def test_a_body_that_drips_is_given_up(ends: tuple[socket.socket, DeadlineSocket]) -> None:
    """Bytes that keep coming do not prolong the time of the whole body."""
    near, far = ends
    is_over = threading.Event()

    def drip() -> None:
        near.sendall(HEAD + b"Content-Length: 100000\r\n\r\n")
        while not is_over.wait(0.01):
            near.sendall(b" ")

    dripping = threading.Thread(target=drip)
    dripping.start()
    try:
        began = time.monotonic()
        serve(far, receive_timeout=0.1)
        took = time.monotonic() - began
    finally:
        is_over.set()
        dripping.join()
    assert answer_of(near)[0] == 408
    assert took < 20
