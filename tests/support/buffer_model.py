"""The carry-over buffer once more, naively, to compare it with."""

STOP = 0


class Model:
    """What the buffer should do, by scanning lists; nothing is cached and nothing is fast."""

    def __init__(self, limit, group_size, batch_groups, max_tokens, bound):
        self.limit, self.group_size, self.batch_groups = limit, group_size, batch_groups
        self.max_tokens, self.bound = max_tokens, bound
        self.version = 0
        self.admitted = 0
        self.groups = []  # in order of admission
        self.taken = []  # ids of groups, as are these
        self.delivered, self.evicted = [], []

    def rows(self, *states):
        return [t for g in self.groups for t in g["rows"] if t["state"] in states]

    def keys(self, *states):
        if states == ("taken",):
            return [(group, i) for group in sorted(self.taken) for i in range(self.group_size)]
        return [t["key"] for t in self.rows(*states)]

    def may_admit(self):
        outstanding = len(self.groups) + len(self.taken)
        return self.bound is None or outstanding < (self.bound + 1) * self.batch_groups

    def admit(self):
        group = {"id": self.admitted, "first": None}
        group["rows"] = [
            {"key": (group["id"], i), "state": "waiting", "tokens": [], "end": None, "reward": None}
            for i in range(self.group_size)
        ]
        self.groups.append(group)
        self.admitted += 1

    def group_of(self, row):
        return next(g for g in self.groups if row in g["rows"])

    def next(self):
        candidates = self.rows("carried_over") or self.rows("waiting")
        if len(self.rows("in_flight")) >= self.limit or not candidates:
            return None
        row = candidates[0]
        row["state"] = "in_flight"
        group = self.group_of(row)
        if group["first"] is None:
            group["first"] = self.version
        return row["key"]

    def row(self, key):
        return next(t for g in self.groups for t in g["rows"] if t["key"] == key)

    def append(self, key, tokens, logprobs, version):
        row = self.row(key)
        row["tokens"] += [(t, p, version) for t, p in zip(tokens, logprobs, strict=True)]
        if row["tokens"] and row["tokens"][-1][0] == STOP:
            self.finish(key, "stop")
        elif len(row["tokens"]) == self.max_tokens:
            self.finish(key, "length")

    def finish(self, key, reason):
        self.row(key).update(state="finished", end=reason)

    def yield_place(self, key):
        self.row(key)["state"] = "carried_over"

    def carry_over(self):
        moved = self.rows("in_flight")
        for row in moved:
            row["state"] = "carried_over"
        return [row["key"] for row in moved]

    def score(self, key, reward):
        self.row(key).update(state="scored", reward=reward)
        rows = self.group_of(self.row(key))["rows"]
        if any(row["state"] != "scored" for row in rows):
            return False
        for row in rows:
            row["state"] = "ready"
        return True

    def by_urgency(self, *, ready):
        """Started groups, the oldest first version first; with ``ready`` the complete ones."""
        groups = [g for g in self.groups if g["first"] is not None]
        if ready:
            groups = [g for g in groups if g["rows"][0]["state"] == "ready"]
        return sorted(groups, key=lambda g: (g["first"], g["id"]))

    def can_take(self):
        leaving = self.by_urgency(ready=True)[: self.batch_groups]
        if len(leaving) < self.batch_groups:
            return False
        if self.bound is None:
            return True
        # Play the best future there is: from the next version on, the B oldest leave at each.
        left = [g["first"] for g in self.by_urgency(ready=False) if g not in leaving]
        version = self.version + 1
        while left:
            if version - left[0] > self.bound:
                return False
            left, version = left[self.batch_groups :], version + 1
        return True

    def remove(self, group, to):
        self.groups.remove(group)
        to.append(group["id"])

    def settle(self):
        self.delivered += self.taken
        self.taken = []
