"""Names that must not be taken for each other: of namespaces, of groups, of documents."""

from itertools import product

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import TypeAdapter, ValidationError

from schemas.documents import DocumentAttributes, DocumentKey, GroupName, Groups
from schemas.index import PUBLIC_GROUP, metadata_term
from schemas.names import Names

GROUPS = TypeAdapter(Groups)


def indices_of(names):
    generations = [of(f"g{number}") for of in (names.chunks_index, names.manifests_index) for number in (1, 20)]
    return {*generations, names.vectors_index, names.keys_index, names.webhooks_index, names.waiting_index}


NAMESPACES = ("a", "a-b", "a-chunks", "a-chunks-g1", "a-vectors", "a-webhooks", "a-b-chunks", "b")


@pytest.mark.parametrize("namespace", NAMESPACES)
def test_a_namespace_owns_its_indices_and_none_of_another(namespace):
    names = Names(namespace)
    everything = {index for other in NAMESPACES for index in indices_of(Names(other))}
    assert {index for index in everything if names.owns_index(index)} == indices_of(names)


def test_no_group_can_be_named_as_what_is_stored_for_everyone():
    for kind in (GROUPS, TypeAdapter(GroupName)):
        with pytest.raises(ValidationError):
            kind.validate_python([PUBLIC_GROUP] if kind is GROUPS else PUBLIC_GROUP)


@given(st.lists(st.text(max_size=4) | st.sampled_from(("*", " * ", ",everyone", "everyone"))))
def test_groups_that_are_taken_are_never_everyones_and_stay_as_they_are(names):
    try:
        taken = DocumentAttributes(groups=tuple(names)).groups
    except ValidationError:
        return
    assert bool(taken) == bool(names)
    assert PUBLIC_GROUP not in taken
    assert len(set(taken)) == len(taken)
    assert all(name == name.strip() for name in taken)
    assert GROUPS.validate_python(taken) == taken


def test_two_pairs_of_name_and_value_never_share_a_term():
    texts = ["".join(signs) for length in range(4) for signs in product("a=\\", repeat=length)]
    pairs = [(name, value) for name in texts for value in texts]
    assert len({metadata_term(*pair) for pair in pairs}) == len(pairs)


@given(st.from_regex(r"\A[a-z][a-z0-9_-]{0,9}\Z"), st.text("a/=:", min_size=1, max_size=8))
def test_a_key_reads_back_whatever_signs_its_document_id_has(tenant, document_id):
    assert DocumentKey.parse(str(DocumentKey(tenant, document_id))) == DocumentKey(tenant, document_id)
