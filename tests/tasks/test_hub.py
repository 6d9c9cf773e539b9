"""The tasks of the field load over HTTP: `datasets` and `huggingface_hub` themselves ask a small Hub of our own."""

import dataclasses
import hashlib
import json
import os
import shutil
import subprocess
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import unquote, urlsplit

import pytest
from datasets import ClassLabel, Dataset, Features, List, Sequence, Value

from zofo.tasks.task import load_task

COMMIT = "0123456789" * 4
TEXT, INT = Value("string"), Value("int32")


def one_of(*classes):
    return ClassLabel(names=list(classes))


YES_NO = {"idx": INT, "label": one_of("False", "True")}
PAIR = {"premise": TEXT, "hypothesis": TEXT, "idx": INT}
SALE = "Eve sold a boat and a bell."
NEWS = "Ida beat Olaf.\n@highlight\nA final in Ulm"
SPANS = {"text": ["Ida", "Olaf", "Ulm"], "start": [0, 9, 37], "end": [3, 13, 40]}

# where the Hub has each data set, and its columns: their order, their types, and the order of the classes
HUB = {
    "sst2": ("nyu-mll/glue", "sst2", {"sentence": TEXT, "label": one_of("negative", "positive"), "idx": INT}),
    "rte": ("aps/super_glue", "rte", {**PAIR, "label": one_of("entailment", "not_entailment")}),
    "cb": ("aps/super_glue", "cb", {**PAIR, "label": one_of("entailment", "contradiction", "neutral")}),
    "boolq": ("aps/super_glue", "boolq", {"question": TEXT, "passage": TEXT, **YES_NO}),
    "wsc": ("aps/super_glue", "wsc.fixed", {
        "text": TEXT, "span1_index": INT, "span2_index": INT, "span1_text": TEXT, "span2_text": TEXT, **YES_NO}),
    "wic": ("aps/super_glue", "wic", {
        "word": TEXT, "sentence1": TEXT, "sentence2": TEXT, "start1": INT, "start2": INT, "end1": INT, "end2": INT,
        **YES_NO}),
    "multirc": ("aps/super_glue", "multirc", {
        "paragraph": TEXT, "question": TEXT, "answer": TEXT, **YES_NO,
        "idx": {"paragraph": INT, "question": INT, "answer": INT}}),
    "copa": ("aps/super_glue", "copa", {
        "premise": TEXT, "choice1": TEXT, "choice2": TEXT, "question": TEXT, "idx": INT,
        "label": one_of("choice1", "choice2")}),
    "record": ("aps/super_glue", "record", {
        "passage": TEXT, "query": TEXT, "entities": List(TEXT),
        "entity_spans": Sequence({"text": TEXT, "start": INT, "end": INT}), "answers": List(TEXT),
        "idx": {"passage": INT, "query": INT}}),
    "winogrande": ("allenai/winogrande", "winogrande_m", {
        "sentence": TEXT, "option1": TEXT, "option2": TEXT, "answer": TEXT}),
    "squad": ("rajpurkar/squad", "plain_text", {
        "id": TEXT, "title": TEXT, "context": TEXT, "question": TEXT,
        "answers": Sequence({"text": TEXT, "answer_start": INT})}),
    "drop": ("ucinlp/drop", "default", {
        "section_id": TEXT, "query_id": TEXT, "passage": TEXT, "question": TEXT,
        "answers_spans": Sequence({"spans": TEXT, "types": TEXT})}),
}  # fmt: skip

# rows of ours, a value for each column; the answer that zofo should make of each comes first
ROWS = {
    "sst2": [(" great", "a slow film with a warm heart ", "positive", 0),
             (" terrible", "two hours of noise ", "negative", 1)],
    "rte": [("Yes", "The mill burnt down in May.", "There was a fire.", 0, "entailment"),
            ("No", "The mill was sold in May.", "There was a fire.", 1, "not_entailment")],
    "cb": [("Yes", "Ada knows that it snows.", "it snows", 0, "entailment"),
           ("No", "Ada only dreamt that it snows.", "it snows", 1, "contradiction"),
           ("Maybe", "Does Ada think that it snows?", "it snows", 2, "neutral")],
    "boolq": [(" Yes", "is the ferry free", "Nobody pays for the ferry.", 0, "True"),
              (" No", "is the bridge free", "The bridge takes a toll.", 1, "False")],
    "wsc": [("Yes", "Ben fed the cat because it was hungry.", 2, 5, "the cat", "it", 0, "True"),
            ("No", "Ben fed the cat because he was kind.", 2, 5, "the cat", "he", 1, "False")],
    "wic": [("No", "bank", "The bank was muddy.", "The bank lent us money.", 4, 4, 8, 8, 0, "False"),
            ("Yes", "bank", "The bank was shut.", "The bank lent us money.", 4, 4, 8, 8, 1, "True")],
    "multirc": [("Yes", SALE, "What was sold?", "A bell", {"paragraph": 0, "question": 0, "answer": 0}, "True"),
                ("No", SALE, "What was sold?", "A shed", {"paragraph": 0, "question": 0, "answer": 1}, "False")],
    "copa": [(" the road was icy.", "The cart slid.", "The road was icy.", "It was late.", "cause", 0, "choice1"),
             (" we mopped up.", "The jug fell.", "It was late.", "We mopped up.", "effect", 1, "choice2")],
    "record": [
        ("Ida", NEWS, "Now @placeholder holds the cup.", SPANS["text"], SPANS, ["Ida"], {"passage": 0, "query": 0}),
        ("Olaf", NEWS, "It was lost by @placeholder.", SPANS["text"], SPANS, ["Olaf"], {"passage": 0, "query": 1})],
    "winogrande": [("trunk", "The lute is not in the trunk since the _ is too small.", "lute", "trunk", "2"),
                   ("lute", "The lute is not in the trunk since the _ is too large.", "lute", "trunk", "1")],
    "squad": [(" a dam", "a", "Old_Mill", "By a dam.", "Where?", {"text": ["a dam", "dam"], "answer_start": [3, 5]}),
              (" 1907", "b", "Old_Mill", "Built in 1907.", "When?", {"text": ["1907"], "answer_start": [9]})],
    "drop": [(" 5", "s", "a", "Ulm scored 3, then 2.", "All?", {"spans": ["5", "five"], "types": ["number", "span"]}),
             (" Ulm", "s", "b", "Ulm scored 3, then 2.", "Who?", {"spans": ["Ulm"], "types": ["span"]})],
}  # fmt: skip

# repositories that are not there (the Hub may answer 401 as well as 404), a part and a split that are not there
MISSING = {
    "nobody/nothing#train": "doesn't exist on the Hub",
    "nobody/private#train": "doesn't exist on the Hub",
    "aps/super_glue:rts#train": "BuilderConfig 'rts' not found",
    "aps/super_glue:rte#dev": 'Unknown split "dev"',
}

# All tasks in one process, since its imports take seconds. It looks up no other machine: `datasets` asks for one
# besides the Hub, and does without it.
LOAD = """
import dataclasses, json, socket, sys
from zofo import ZofoError
from zofo.tasks.task import load_task

def look_up(host, *more, real=socket.getaddrinfo, **options):
    if host != "127.0.0.1":
        raise socket.gaierror(f"{host} is out of bounds")
    return real(host, *more, **options)

def load(name):
    try:
        return {split: [dataclasses.asdict(r) for r in rows] for split, rows in load_task(name).records().items()}
    except ZofoError as error:
        return str(error)

socket.getaddrinfo = look_up
print(json.dumps([load(name) for name in sys.argv[1:]]))
"""


class Hub(BaseHTTPRequestHandler):
    """What public data sets take of the Hub's interface."""

    protocol_version = "HTTP/1.1"

    def do_GET(self):
        path = unquote(urlsplit(self.path).path).removeprefix("/api").removeprefix("/datasets/")
        status, headers, body = self.reply(*[*path.split("/", maxsplit=4), "", "", ""][:5])
        self.send_response(status)
        for name, text in {**headers, "Content-Length": str(len(body))}.items():
            self.send_header(name, text)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def do_HEAD(self):
        self.do_GET()

    def reply(self, owner, name, verb, _, path):
        files = self.server.repositories.get(f"{owner}/{name}")
        if files is None:
            return 401 if name == "private" else 404, {"X-Error-Code": "RepoNotFound"}, b""
        if verb == "revision":
            return 200, {}, json.dumps({"id": f"{owner}/{name}", "sha": COMMIT}).encode()
        about = {
            file: {"type": "file", "path": file, "size": len(data), "oid": hashlib.sha256(data).hexdigest()}
            for file, data in files.items()
        }
        if verb == "tree":
            folders = set() if path else {file.rpartition("/")[0] for file in files} - {""}
            listed = [{"type": "directory", "path": folder, "oid": COMMIT} for folder in folders]
            listed += [about[file] for file in files if file.rpartition("/")[0] == path]
            return 200, {}, json.dumps(listed).encode()
        if path not in files:
            return 404, {"X-Error-Code": "EntryNotFound", "X-Repo-Commit": COMMIT}, b""
        tag = f'"{about[path]["oid"]}"'
        headers = {"X-Repo-Commit": COMMIT, "ETag": tag, "X-Linked-Etag": tag, "X-Linked-Size": str(len(files[path]))}
        if verb == "resolve" and path.endswith(".parquet"):  # the Hub keeps large files on another server
            url = f"http://{self.headers['Host']}{self.path.replace('/resolve/', '/elsewhere/')}"
            return 302, {**headers, "Location": url}, b""
        return 200, headers, files[path]

    def log_message(self, *_):
        """Says nothing."""


def write_splits(folder, name):
    """A Parquet file for each split that the Hub has; validation is train from back to front."""
    repository, _, columns = HUB[name]
    rows = [dict(zip(columns, row[1:], strict=True)) for row in ROWS[name]]
    splits = {"train": rows, "validation": rows[::-1]}
    if repository not in ("rajpurkar/squad", "ucinlp/drop"):  # the others have a test split that hides the answers
        hidden = {"label": -1} if "label" in columns else {"answer": "", "answers": []}
        splits["test"] = [{column: hidden.get(column, value) for column, value in row.items()} for row in rows]
    for split, own in splits.items():
        Dataset.from_list(own, Features(columns)).to_parquet(folder / name / f"{split}.parquet")
    return {split: folder / name / f"{split}.parquet" for split in splits}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """The same rows as local files, a folder for each task."""
    return tmp_path_factory.mktemp("hub")


@pytest.fixture(scope="module")
def loaded(folder):
    """What a process that is connected to the small Hub makes of each task: {split: records}, or an error."""
    repositories, cards = {}, {}
    for name, (repository, part, _) in HUB.items():
        inside = "data" if part == "default" else part
        files = write_splits(folder, name)
        repositories.setdefault(repository, {}).update(
            {f"{inside}/{split}-00000-of-00001.parquet": file.read_bytes() for split, file in files.items()}
        )
        patterns = [{"split": split, "path": f"{inside}/{split}-*"} for split in files]
        cards.setdefault(repository, []).append({"config_name": part, "data_files": patterns})
    for repository, configs in cards.items():
        repositories[repository]["README.md"] = f"---\nconfigs: {json.dumps(configs)}\n---\n".encode()
    tasks = list(HUB)
    for number, source in enumerate(MISSING):
        tasks.append(str(folder / f"{number}.yaml"))
        (folder / f"{number}.yaml").write_text(json.dumps({"source": {"train": source}, "prompt": "a", "answer": "b"}))
    # whatever the environment says about another Hub, its cache, a token or a proxy does not count
    environment = {k: v for k, v in os.environ.items() if not k.startswith("HF_") and "proxy" not in k.lower()}
    environment |= {"HF_HOME": str(folder / "home"), "HF_UPDATE_DOWNLOAD_COUNTS": "0", "NO_PROXY": "127.0.0.1"}
    with ThreadingHTTPServer(("127.0.0.1", 0), Hub) as server:
        server.repositories = repositories
        threading.Thread(target=server.serve_forever, daemon=True).start()
        environment["HF_ENDPOINT"] = f"http://127.0.0.1:{server.server_port}"
        command = [sys.executable, "-W", "ignore", "-c", LOAD, *tasks]
        done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=120, check=False)
        server.shutdown()
    assert done.returncode == 0, done.stderr
    return dict(zip((*HUB, *MISSING), json.loads(done.stdout), strict=True))


@pytest.mark.parametrize("name", HUB)
def test_a_task_loads_from_the_hub_as_from_local_files(name, folder, loaded):
    local = load_task(name, str(folder / name)).records()
    as_json = json.loads(json.dumps({split: [dataclasses.asdict(r) for r in rows] for split, rows in local.items()}))
    assert loaded[name] == as_json
    answers = [row[0] for row in ROWS[name]]
    assert {split: [r["completion"] for r in rows] for split, rows in loaded[name].items()} == {
        "train": answers,
        "test": answers[::-1],
    }


def offline(**places):
    """The tasks that `zofo tasks` calls offline where the caches are in these places."""
    environment = {k: v for k, v in os.environ.items() if not k.startswith("HF_")} | places
    command = [sys.executable, "-m", "zofo.cli", "tasks"]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=True)
    lines = [line.split() for line in done.stdout.splitlines()[1:-2]]
    return {name for name, *line in lines if "yes" in line} & HUB.keys()


def test_what_has_been_loaded_is_listed_as_here_offline(folder, loaded, tmp_path):
    assert offline(HF_HOME=str(folder / "home")) == HUB.keys()
    assert offline(HF_HOME=str(tmp_path), HF_DATASETS_CACHE=str(folder / "home" / "datasets")) == HUB.keys()
    shutil.copytree(folder / "home" / "datasets" / "aps___super_glue" / "cb", tmp_path / "datasets/aps___super_glue/cb")
    assert offline(HF_HOME=str(tmp_path)) == {"cb"}
    assert offline(HF_HOME=str(tmp_path), XDG_CACHE_HOME=str(folder)) == {"cb"}
    (folder / "huggingface").symlink_to(folder / "home")
    assert offline(XDG_CACHE_HOME=str(folder)) == HUB.keys()


@pytest.mark.parametrize(("source", "reason"), MISSING.items(), ids=MISSING)
def test_what_the_hub_does_not_have_is_said_in_one_line_with_the_source(source, reason, loaded):
    assert loaded[source].startswith(f"cannot load the data set {source.partition('#')[0]!r} (")
    assert reason in loaded[source]
    assert "\n" not in loaded[source]
