"""Drafters for tests: one that knows the answer, one that proposes anything."""

import random

from blockffn_mlx.speculative import Tree


class ScriptedDrafter:
    """What drafters share: counts what the cache holds and checks what it is told."""

    def __init__(self):
        self.reset()

    def reset(self, offset=0):
        self.offset = offset
        self.tokens = []

    def rewind(self, length):
        self.tokens = self.tokens[: length - self.offset]

    @property
    def length(self):
        return self.offset + len(self.tokens)

    def observe(self, hidden, tokens):
        assert hidden.shape[:2] == (1, len(tokens))
        self.tokens += tokens

    def ready(self, root):
        return True


class OracleDrafter(ScriptedDrafter):
    """Proposes the true continuation as a chain, each node among wrong siblings.

    Args:
        text: The whole sequence, prompt and answer.
        depth: True tokens per tree.
        siblings: Wrong siblings of each.
    """

    def __init__(self, text, vocab_size, depth=4, siblings=2):
        super().__init__()
        self.text, self.vocab_size, self.depth, self.siblings = text, vocab_size, depth, siblings

    def draft(self, root, total_tokens, max_depth):
        place = len(self.tokens) + 1
        assert self.text[:place] == self.tokens + [root]
        tokens, parents, parent = [root], [-1], 0
        for true in self.text[place : place + min(self.depth, max_depth)]:
            wrong = [(true + 1 + i) % self.vocab_size for i in range(self.siblings)]
            tokens += wrong[:1] + [true] + wrong[1:]
            parents += [parent] * (1 + self.siblings)
            parent = len(tokens) - self.siblings if self.siblings else len(tokens) - 1
        return Tree.from_lists(tokens, parents)


class RandomDrafter(ScriptedDrafter):
    """Proposes random trees that hold pieces of the true continuation in odd places.

    Duplicate siblings, true tokens under wrong parents, chains and stars: all occur.
    """

    def __init__(self, text, vocab_size, seed=0):
        super().__init__()
        self.text, self.vocab_size = text, vocab_size
        self.random = random.Random(seed)

    def draft(self, root, total_tokens, max_depth):
        place = len(self.tokens) + 1
        size = self.random.randrange(1, total_tokens + 1)
        reach = self.random.choice([1, 3, size])  # how far back a parent may lie
        tokens, parents, depths = [root], [-1], [0]
        for node in range(1, size):
            parent = self.random.randrange(max(0, node - reach), node)
            if depths[parent] == max_depth:
                parent = 0
            depth = depths[parent] + 1
            true = place + depth - 1
            if self.random.random() < 0.7 and true < len(self.text):
                token = self.text[true]
            else:
                token = self.random.randrange(self.vocab_size)
            tokens.append(token)
            parents.append(parent)
            depths.append(depth)
        return Tree.from_lists(tokens, parents)
