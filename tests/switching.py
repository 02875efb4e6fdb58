"""Switching between mixtures and tokens, one row at a time and without arrays of rows."""

import numpy as np

from tokenlab.decode import SwitchingFeed


class PlainSwitching:
    """Holds one row; ``step`` gives the token written, the shares read or None, and the end."""

    def __init__(self, feed: SwitchingFeed):
        self.feed, self.explicit, self.locked = feed, feed.begins_explicit, False
        self.stay = self.turns = 0
        self.queue, self.left = [], None
        self.modes, self.entropies = [], []

    def step(self, number, token, logits):
        feed = self.feed
        p = np.exp(logits.astype(np.float64) - logits.max())
        p /= p.sum()
        entropy = -sum(x * np.log(x) for x in p if x > 0)
        self.locked = self.locked or token == feed.close
        if self.queue:
            token = self.queue.pop(0)
            self.locked = self.locked or (feed.cap.locks and token == feed.close)
        if self.left is not None:
            self.left -= 1
        stop = self.left == 0
        turn = self._switch(number, entropy)
        if turn == "explicit" and feed.cap is not None:
            if self.turns > 2 * feed.cap.most:
                self.queue = [feed.close, *feed.cap.answer]
                self.left = feed.cap.budget if self.left is None else self.left
            elif self.turns >= feed.cap.most:
                self.queue = [feed.close]
        self.modes.append(self.explicit)
        self.entropies.append(entropy)
        return token, self._read(number, token, p, turn), stop

    def _switch(self, number, entropy):
        if number == 0:
            self.reference = entropy
            return None
        self.stay += 1
        if not self.explicit and entropy < self.reference:
            turn, self.turns = "explicit", self.turns + 1
        elif (
            self.explicit
            and entropy > self.reference
            and self.feed.dwell is not None
            and self.stay >= self.feed.dwell
            and not self.locked
        ):
            turn = "latent"
        else:
            return None
        self.explicit, self.stay, self.reference = not self.explicit, 0, entropy
        return turn

    def _read(self, number, token, p, turn):
        signals = self.feed.signals
        if signals is not None:
            passed = min(number / signals.horizon, 1)
            for name, share, other in (
                ("latent", signals.to_latent, self.feed.think),
                ("explicit", signals.to_explicit, self.feed.close),
            ):
                if turn == name:
                    kept = share + (1 - share) * passed
                    return kept * p + (1 - kept) * np.eye(len(p))[other]
            if number == 0 and signals.newline is not None and not self.feed.begins_explicit:
                return signals.first * p + (1 - signals.first) * np.eye(len(p))[signals.newline]
        if self.explicit or self.locked or token in self.feed.literal:
            return None
        return p
