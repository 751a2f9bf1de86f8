"""What holds for every corpus: packed rows hold whole documents, each by itself."""

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from blockffn_mlx.training.data import Corpus, Source
from blockffn_mlx.training.sampling import DocumentPacker

few = settings(max_examples=60, deadline=None, derandomize=True)


@few
@given(
    st.lists(st.integers(1, 30), min_size=1, max_size=12),
    st.integers(4, 24),
    st.sampled_from([1, 2, 4]),
    st.integers(0, 99),
)
def test_packed_rows_hold_whole_documents(lengths, context, multiple, seed):
    starts = np.cumsum([0, *lengths[:-1]])
    tokens = np.arange(1, sum(lengths) + 1)  # each names its own place
    documents = [tokens[s : s + n].tolist() for s, n in zip(starts, lengths, strict=True)]
    corpus = Corpus(pad=0)
    corpus.train["a"] = Source("a", tokens, starts)
    packer = DocumentPacker(corpus, None, context, seed, isolate=True, multiple=multiple)
    batch = packer.batch(3)
    assert batch.inputs.shape == batch.targets.shape == (3, context)
    for row in range(3):
        whole = [*batch.inputs[row].tolist(), int(batch.targets[row, -1])]
        begun = [i for i, token in enumerate(whole) if token - 1 in starts and token]
        assert begun[0] == 0 and all(at % multiple == 0 for at in begun)
        for at, end in zip(begun, [*begun[1:], len(whole)], strict=True):
            found = [token for token in whole[at:end] if token]
            document = next(d for d in documents if d[0] == found[0])
            assert found == document[: context + 1]
        segments = batch.segments[row]
        for i in np.flatnonzero(batch.scored[row] & batch.real[row]):
            # What is scored follows its own predecessor in its own document.
            if batch.targets[row, i]:
                assert batch.targets[row, i] == batch.inputs[row, i] + 1
                assert i + 1 == context or segments[i] == segments[i + 1]
