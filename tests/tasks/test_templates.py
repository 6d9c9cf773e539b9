"""Templates render rows, and can neither leave their sandbox nor run or grow without end."""

import resource
import signal
from contextlib import contextmanager
from pathlib import Path

import pytest

from zofo.errors import ZofoError
from zofo.tasks.templates import expression, text_template

ROW = {"text": "A film", "label": 1, "words": ["bad", "good"]}
SECONDS, EXTRA_BYTES = 2.0, 1 << 28


class StillRunningError(Exception):
    """The template ran out of the time that the test gives it."""


@contextmanager
def bounded():
    """Within the block, time and memory end before the machine does: neither is a ZofoError, so both fail the test."""

    def stop(number, frame):
        raise StillRunningError

    used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    handler = signal.signal(signal.SIGALRM, stop)
    resource.setrlimit(resource.RLIMIT_AS, (used + EXTRA_BYTES, hard))
    signal.setitimer(signal.ITIMER_REAL, SECONDS)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        resource.setrlimit(resource.RLIMIT_AS, (soft, hard))
        signal.signal(signal.SIGALRM, handler)


def refused(source, make=text_template, row=ROW):
    """The message with which a template is refused, at reading or at rendering."""
    with bounded(), pytest.raises(ZofoError) as caught:
        make(source, "t.yaml, prompt")(row)
    message = str(caught.value)
    assert message.startswith("t.yaml, prompt")
    assert "\n" not in message
    return message


@pytest.mark.parametrize(
    ("source", "text"),
    [
        ("{{ text }} It was", "A film It was"),
        ("{{ words[label] }}", "good"),
        ("{{ ' great' if label > 0 else ' terrible' }}", " great"),
        ("{% for word in words %}{{ word }} {% endfor %}{{ text|upper }}", "bad good A FILM"),
        ("{{ text.split(' ')[1] }}\n", "film\n"),
        ("{{ '<&>' }}", "<&>"),
        ("{{ {0: 'no', 1: 'yes'}[label] }}", "yes"),
        ("{{ 2 * label ** 2 }}", "2"),
    ],
)
def test_a_template_renders_a_row(source, text):
    assert text_template(source, "t.yaml, prompt")(ROW) == text


@pytest.mark.parametrize(
    ("source", "value"), [("label > 0", True), ("{{ words }}", ["bad", "good"]), (" {{ [text] + words }} ", None)]
)
def test_an_expression_gives_a_value(source, value):
    assert expression(source, "t.yaml, where")(ROW) == (["A film", "bad", "good"] if value is None else value)


ESCAPES = [
    "{{ ''.__class__ }}",
    "{{ ''|attr('__class__') }}",
    "{{ ''['__class__'] }}",
    "{{ text.__init__.__globals__ }}",
    "{{ lipsum.__globals__ }}",
    "{{ cycler.__init__ }}",
    "{{ self.__init__ }}",
    "{{ range.__self__ }}",
    "{{ '{0.__class__}'.format(text) }}",
    "{{ '{0.__class__}'|format(text) ~ '{x.__class__}'.format_map({'x': 1}) }}",
    "{{ words.append('x') }}",
    "{{ words.clear() }}",
    "{% include '/etc/passwd' %}",
    "{% import 'os' as os %}",
    "{% extends 'base' %}",
]


@pytest.mark.parametrize("source", ESCAPES)
def test_a_template_cannot_leave_the_sandbox(source):
    row = {**ROW, "words": ["bad", "good"]}
    refused(source, row=row)
    assert row["words"] == ["bad", "good"]


@pytest.mark.parametrize("source", ["{{ ''.__class__ }}", "().__class__.__bases__[0].__subclasses__()"])
def test_an_expression_cannot_leave_the_sandbox(source):
    refused(source, expression)


ENDLESS = {
    "nested loops": "{% for i in range(1000) %}{% for j in range(1000) %}x{% endfor %}{% endfor %}",
    "a recursive loop": "{% for x in [1] recursive %}{{ loop([1]) }}{% endfor %}",
    "a macro": "{% macro m() %}{{ m() }}{% endmacro %}{{ m() }}",
    "a block that renders itself": "{% block a %}{{ self.a() }}{% endblock %}",
    "blocks as nested loops": (
        "{% block a %}{% for i in range(999) %}{{ self.b() }}{% endfor %}{% endblock %}"
        "{% block b %}{% for i in range(999) %}{{ self.c() }}{% endfor %}{% endblock %}"
        "{% block c %}{% for i in range(999) %}x{% endfor %}{% endblock %}"
    ),
    "a huge range": "{{ range(1000000000)|list }}",
    "a huge power": "{{ 10 ** 100000000 }}",
    "a tower of powers": "{{ ((((((10 ** 64) ** 64) ** 64) ** 64) ** 64) ** 64) > 0 }}",
    "a huge repetition": "{{ 'a' * 10000000000 }}",
    "a huge repetition the other way round": "{{ 10000000000 * 'a' }}",
    "a repeated list": "{{ [1] * 10000000000 }}",
    "repetitions of a repetition": "{{ 'a' * 10000 * 10000 * 10000 }}",
    "a wide % format": "{{ '%10000000000d' % 1 }}",
    "a wide format filter": "{{ '%10000000000d'|format(1) }}",
    "a wide format": "{{ '{:>10000000000}'.format(1) }}",
    "ljust": "{{ text.ljust(10000000000) }}",
    "zfill": "{{ text.zfill(10000000000) }}",
    "center": "{{ text|center(10000000000) }}",
    "indent": "{{ 'a\nb'|indent(10000000000) }}",
    "expandtabs": "{{ '\t'.expandtabs(2000000000) }}",
    "tojson": "{{ {'a': 1}|tojson(indent=10000000000) }}",
    "batch": "{{ [1]|batch(10000000000, 'x')|list }}",
    "slice": "{{ [1]|slice(10000000000)|list }}",
    "lipsum": "{{ lipsum(n=100000000) }}",
    "a huge precision": "{{ 2.5|round(300000000, 'floor') }}",
    "a huge precision to the left": "{{ 2.5|round(-300000000, 'ceil') }}",
    "chained replacements": "{{ 'aaaa'" + "|replace('a', 'a' * 9999)" * 4 + " }}",
    "a string that doubles": (
        "{% set n = namespace(x='aa') %}{% for i in range(99) %}{% set n.x = n.x ~ n.x %}{% endfor %}{{ n.x }}"
    ),
    "a number that squares": (
        "{% set n = namespace(x=3) %}{% for i in range(99) %}{% set n.x = n.x * n.x %}{% endfor %}{{ n.x > 1 }}"
    ),
}


@pytest.mark.parametrize("source", ENDLESS.values(), ids=ENDLESS)
def test_a_template_cannot_run_or_grow_without_end(source):
    refused(source)


@pytest.mark.parametrize("source", ["range(10 ** 9)", "'a' * 10 ** 10", "[text] * 10 ** 10"])
def test_an_expression_cannot_grow_without_end(source):
    refused(source, expression)


@pytest.mark.parametrize("source", ["{{ text|join(text) }}", "{{ text.join(text) }}", "{{ range(1000)|join(text) }}"])
def test_joined_texts_cannot_grow_beyond_what_a_field_may_be(source):
    assert "more than 1000000 characters" in refused(source, row={"text": "x" * 100_000})
    assert text_template(source.replace("range(1000)", "'ab'"), "t")({"text": "ab"})


def test_lists_are_not_summed_as_each_sum_copies_those_before_it():
    refused("{{ words|sum(start=[])|length }}", row={"words": [["a"]] * 200_000})
    assert text_template("{{ numbers|sum(start=0.5) }}", "t")({"numbers": [1, 2]}) == "3.5"


LONG = {
    "a sum": "1" + " + label" * 4000,
    "a chain of items": "words" + "[0]" * 4000,
    "a chain of filters": "text" + "|lower" * 4000,
    "conditions": "1" + " if label else 2" * 2000,
    "parentheses": "(" * 4000 + "1" + ")" * 4000,
}


@pytest.mark.parametrize("make", [text_template, expression])
@pytest.mark.parametrize("source", LONG.values(), ids=LONG)
def test_a_template_too_long_for_python_is_refused_in_one_line(source, make):
    refused("{{ " + source + " }}", make)


def test_more_conditions_in_each_other_than_python_can_indent_are_refused_in_one_line():
    assert "too long or nested too deep" in refused("{% if label %}" * 120 + "x" + "{% endif %}" * 120)


def test_a_field_of_a_million_characters_is_too_long():
    assert "more than 1000000 characters" in refused("{{ text }}", row={"text": "x" * 1_000_001})


@pytest.mark.parametrize(
    ("source", "name"),
    [
        ("{{ missing }}", "'missing' is undefined"),
        ("{{ text.missing }}", "missing"),
        ("{{ words[5] }}", "5"),
        ("{{ {'a': 1}['b'] }}", "b"),
        ("{{ 1 / (label - 1) }}", "division by zero"),
        ("{{ text + label }}", "str"),
        ("{{ text", "no valid template"),
        ("{% if text %}", "no valid template"),
        ("{{ text|nosuch }}", "nosuch"),
        ("{{ text is nosuch }}", "nosuch"),
        ("{% nosuch %}", "no valid template"),
    ],
)
def test_a_mistake_in_a_template_is_said_in_one_line(source, name):
    assert name in refused(source)


@pytest.mark.parametrize("source", ["missing", "missing > 1", "not missing", "text|nosuch", "text +", "a }} {{ b"])
def test_a_mistake_in_an_expression_is_said_in_one_line(source):
    refused(source, expression)


@pytest.mark.parametrize("value", [None, {"nested": 1}], ids=["null", "nested"])
def test_a_missing_or_nested_value_does_not_become_text(value):
    """`None` or `{'nested': 1}` in a prompt or an answer is never meant."""
    refused("It is {{ label }}", row={"label": value})


@pytest.mark.parametrize("value", [0, 1.5, True, "text", ""])
def test_plain_values_become_text(value):
    assert text_template("{{ label }}", "here")({"label": value}) == str(value)
