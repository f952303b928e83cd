"""The decoder on any JSON at all, much of it looking like a tag: it returns a value or says that there
is none, imports nothing, and spoils nothing for others."""

import inspect
import json
import re
import sys
from types import SimpleNamespace

import pytest
from django.contrib.auth.models import User
from django.db import connection
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from spark_outbox.errors import InstanceGone, UnreadablePayload
from spark_outbox.events import decoding, references
from spark_outbox.events import event as events
from spark_outbox.events.decoding import LazyPayload, zones
from spark_outbox.events.encoding import encode
from spark_outbox.events.references import References
from spark_outbox.models import OutboxEvent
from spark_outbox.testing import drain
from tests.events.test_payload import Counting, same, values
from tests.probe.models import Named
from tests.tools import make_challenge

pytestmark = pytest.mark.django_db

TAGS = """
    model dict tuple set frozenset text float datetime date time timedelta decimal uuid bytes no
""".split()  # noqa: SIM905
LABELS = """
    challenges.challenge Challenges.Donation auth.user probe.named probe.nicknamed probe.nameless
    probe.nowhere os.path json.tool antigravity.fly this.s sites.site
""".split()  # noqa: SIM905
NEARLY = {
    "date": ["2026-01-01", "99999-01-01", "2026-W01-1"],
    "datetime": ["2026-01-01T00:00:00+00:00", "2026-01-01T02:30:00+23:59:59.999999", "9999-12-31T24:00"],
    "time": ["24:00", "12:00:00Z"],
    "timedelta": [[0, 10**12, 0], [10**9, -(10**14), 1.5], ["1", 0, 0]],
    "float": ["1e5", "-0.0", "1e400", "nan", "Infinity", "\u0660"],
    "decimal": ["sNaN", "-NaN7", "1e-999999", "1e999999999999", "0E+5", "1,5", [0, [1], 2]],
    "text": ["AAAA", "/w==", "7aCA", "?"],
    "bytes": ["AAAA", "AAA"],
    "uuid": ["{00000000000000000000000000000001}", "00000000-0000-0000-0000-000000000001", "zz"],
    "set": [[{"$": ["decimal", "sNaN"]}], [[]], "ab"],
    "dict": [[[[], 1]], [[1, 2, 3]], {"ab": 1}],
}
ZONES = ["Europe/Zurich", "UTC", "Europe/Atlantis", "antigravity", "../etc", "", 5, None]
ROWS = [
    ["challenges.challenge", 1],
    ["challenges.challenge", 3],
    ["auth.user", 2],
    ["probe.named", "no"],
]

names = st.sampled_from(TAGS)
contents = st.sampled_from([text for texts in NEARLY.values() for text in texts])
nearly = st.sampled_from([(tag, text) for tag, texts in NEARLY.items() for text in texts])
numbers = st.integers() | st.floats(allow_nan=False, allow_infinity=False)
plain = st.none() | st.booleans() | numbers | st.text(max_size=5)
stored = values.map(lambda value: json.loads(encode(value, (None, "value", 0))))
rows = st.sampled_from(ROWS).map(lambda to: {"$": ["model", *to, "default"]})


def tags(inner):
    pairs = st.lists(st.lists(inner, min_size=2, max_size=2), max_size=3)
    aliases = st.sampled_from(["default", "default", "default", "no", None])
    keys = st.integers(-1, 3) | st.sampled_from(["no", "2"]) | inner
    return st.one_of(
        nearly,
        nearly,
        st.tuples(names, inner | contents | st.lists(inner, max_size=3) | pairs),
        st.tuples(names, contents, inner | st.sampled_from([0, 1])),
        st.tuples(
            st.sampled_from(["datetime", "time"]),
            contents,
            st.sampled_from([0, 1]),
            st.sampled_from(ZONES) | inner,
        ),
        st.tuples(st.just("timedelta"), st.lists(st.integers(-(10**10), 10**10), max_size=8)),
        st.tuples(st.just("model"), st.sampled_from(LABELS), keys, aliases),
        st.tuples(st.just("model"), inner, inner, inner),
        st.lists(inner, max_size=4).map(tuple),
        inner,
    ).map(lambda content: {"$": list(content) if isinstance(content, tuple) else content})


def containers(inner):
    return st.lists(inner, max_size=4) | st.dictionaries(st.sampled_from(["a", "b", "$"]), inner)


documents = st.one_of(
    st.recursive(plain | contents, lambda inner: tags(inner) | containers(inner), max_leaves=10),
    st.recursive(stored | rows, containers, max_leaves=5),
    st.recursive(stored | tags(plain | contents), containers, max_leaves=2),
)


@pytest.fixture
def fuzzed():
    """Rows for some of the references; and no table to trip over."""
    Named.objects.create(name="no")
    make_challenge(pk=1)
    User.objects.create(pk=2)
    zones()  # looks for the package tzdata, once
    with connection.cursor() as cursor:
        cursor.execute("create temporary table probe_nowhere (id bigint)")


class NoImports:
    """Stands first in sys.meta_path: sees what is looked for that is not imported yet."""

    def find_spec(self, name, path=None, target=None):
        raise AssertionError(f"{name} is being imported")


@settings(
    max_examples=1000,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
@given(document=documents)
@example({"$": ["model", "challenges.challenge", {"$": ["decimal", "1e999999999999"]}, "default"]})
@example({"$": ["model", "challenges.challenge", {"$": ["model", *ROWS[0], "default"]}, "default"]})
@example({"$": ["model", "os.path", "/etc/passwd", "default"]})
@example({"$": ["datetime", "2026-01-01T00:00:00+00:00", 0, "antigravity"]})
@example({"$": ["datetime", "0001-01-01T00:00:00+23:00", 0, "UTC"]})
def test_any_json_is_decoded_or_unreadable_and_nothing_is_imported_for_it(fuzzed, document):
    neighbour = {"a": {"$": ["model", "challenges.challenge", 1, "default"]}}
    of_a_batch = References()
    bad, good = (LazyPayload(json.dumps(each), of_a_batch) for each in ({"a": document}, neighbour))
    of_a_batch.add([SimpleNamespace(payload=bad), SimpleNamespace(payload=good)])
    counting, modules, verdict, value = Counting(), set(sys.modules), None, None
    sys.meta_path.insert(0, NoImports())
    try:
        with connection.execute_wrapper(counting):
            try:
                bad.check()
            except UnreadablePayload as error:
                verdict = error
            assert not counting.statements  # it fetches nothing
            assert not (verdict and decoding.is_simple(json.dumps({"a": document})))
            assert good["a"].pk == 1  # whatever the other refers to
            try:
                value = bad["a"]
            except InstanceGone:
                return
            except UnreadablePayload:
                assert verdict
                return
    finally:
        del sys.meta_path[0]
        assert set(sys.modules) == modules
        assert all(re.match(r'SELECT .* FROM "', sql) for sql in counting.statements)
    assert not verdict
    again = encode(value, (None, "payload", 0))
    new = LazyPayload(f'{{"a": {again}}}', References())["a"]
    assert same(new, value)
    assert encode(new, (None, "payload", 0)) == again


def test_a_reference_to_a_module_imports_nothing(own_registry):
    """`this` is a module that nothing else imports, and `antigravity` one that all would notice."""
    own_registry.add_handler(lambda event: event["a"], group="g", name="h")
    modules = set(sys.modules)
    for number, label in enumerate(["this.s", "antigravity.fly", "os.path", "tests.probe.models.Named"]):
        with connection.cursor() as cursor:
            cursor.execute(
                "insert into spark_outbox_event (key, event_group, payload) values (%s, 'g', %s)",
                [f"{number}", json.dumps({"a": {"$": ["model", label, 1, "default"]}})],
            )
    drain(raise_exceptions=False)
    assert set(sys.modules) == modules
    assert "this" not in modules
    assert set(OutboxEvent.objects.values_list("status", flat=True)) == {"failed"}


def test_what_reads_payloads_has_nothing_to_import_with():
    for module in (events, decoding, references):
        source = inspect.getsource(module)
        assert not re.search(r"\b(importlib|import_\w+|__import__|eval|exec|pickle|marshal)\b", source)
