from collections import Counter
from itertools import islice

from chaos.schedule import MAX_DURATION_S, MIN_DURATION_S, NETWORK, Kind, schedule
from chaos.workload import generated
from ingest.core.changes import Removal

PROCESSES = ("index-1", "index-2", "kafka-1", "kafka-2", "kafka-3", "redis")
LINKS = ("index-1 redis", "index-2 redis", "index-1 kafka", "index-2 kafka")
SINGLE = {Kind.CLOCK_JUMP: ("ingest-2",), Kind.ROLLING_RESTART: ("",)}


def faults(seed: int, count: int):
    return list(islice(schedule(seed, processes=PROCESSES, links=LINKS, single=SINGLE), count))


def test_equal_seeds_give_equal_faults_and_others_do_not():
    assert faults(7, 50) == faults(7, 50)
    assert faults(7, 50) != faults(8, 50)


def test_every_round_has_every_kind():
    turn = Counter({Kind.KILL: 3, Kind.PAUSE: 3} | dict.fromkeys(NETWORK, 3) | dict.fromkeys(SINGLE, 1))
    size = turn.total()
    for number in range(5):
        assert Counter(fault.kind for fault in faults(3, 5 * size)[number * size : (number + 1) * size]) == turn


def test_processes_of_a_kind_alternate():
    killed = [fault.target for fault in faults(5, 400) if fault.kind is Kind.KILL]
    for start in range(0, len(killed) - 3, 3):
        assert {name.rstrip("-123") for name in killed[start : start + 3]} == {"index", "kafka", "redis"}
    brokers = [name for name in killed if name.startswith("kafka")]
    assert {frozenset(brokers[start : start + 3]) for start in range(0, len(brokers) - 2, 3)} == {
        frozenset({"kafka-1", "kafka-2", "kafka-3"})
    }


def test_only_a_kill_has_no_duration():
    for fault in faults(11, 100):
        assert (
            fault.duration_s == 0 if fault.kind is Kind.KILL else MIN_DURATION_S <= fault.duration_s <= MAX_DURATION_S
        )


def test_a_fault_is_named_by_kind_and_kind_of_target():
    names = {fault.name for fault in faults(2, 200)}
    assert {"kill index", "pause redis", "half-open index redis", "clock jump ingest", "rolling restart"} <= names


def test_generated_histories_have_edge_cases_and_depend_on_the_seed_alone():
    events = list(islice(generated(4), 400))
    assert events == list(islice(generated(4), 400))
    uploads = [event for event in events if not isinstance(event, Removal)]
    contents = Counter(event.content for event in uploads if event.content_type == "text/markdown")
    assert len(events) - len(uploads) > 20, "deletes"
    assert any(event.content_type == "application/pdf" for event in uploads), "unparseable content"
    assert any(event.revision is not None for event in uploads), "outdated versions"
    assert max(contents.values()) > 1, "reverted or shared content"
