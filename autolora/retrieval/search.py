"""Ranking a pool for a prompt and choosing a set from it, with the reasons.

Three channels look at each run of words of the prompt: *words* (names that stand in it, or hang
together with it), *texts* (metadata near in meaning) and *weights* (the trained encoder). One
logistic regression (`autolora.retrieval.relevance`) makes of them the probability that a LoRA is
what the run asks for; of a LoRA without metadata only the encoder speaks. A LoRA's score is the
highest over all runs.

A set answers each word once: LoRAs are taken greedily by how much they add (the greedy algorithm
for weighted set cover), and what a chosen one answers is done, so near-duplicates add nothing.
What the prompt asks to leave out is never taken. Where nothing is likely enough, nothing is chosen.

Shape legend: q runs of words, n candidates, D dimensions, F features.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace

import numpy as np
import torch

from autolora.errors import RetrievalError, shown
from autolora.retrieval.index import PoolIndex, TextRow
from autolora.retrieval.languages import Understood, understand
from autolora.retrieval.lexicon import lexicon
from autolora.retrieval.names import Match, NameIndex
from autolora.retrieval.prompt_terms import MAX_RUN, Concept, Word, find_concepts, read_words
from autolora.retrieval.relevance import (
    COSINE_FLOOR,
    FEATURES,
    TEXTS,
    WORDS,
    cosine_feature,
    learned,
    probability,
    vector,
)
from autolora.retrieval.retriever import Retriever
from autolora.retrieval.text import TextEncoder, check_text_encoder

CANDIDATES = 64
THRESHOLD = 0.5
"""Probability from which a LoRA is taken."""
NEAR_DUPLICATE = 0.985
MINILM = (0.74, 18.0)
"""Cosine of MiniLM at which two names mean the same as likely as not, and the slope there: the
scale to which cosines of other encoders are brought."""
_WEIGHTS_FLOOR = 3.0
"""Log-odds below the encoder's threshold from which it has nothing to say about named LoRAs."""
SHORT, LONG = 8, 32
"""Content words of a prompt that is short, and of one that is as long as any."""
LARGEST_LEAD = 0.3
"""Difference of two cosines that leaves no doubt about which one is meant."""
_EXPLAINED = 0.25
"""Probability of a single word from which it, and not its neighbours, is why a run is near."""
_SAID = {
    "name": "its name {1} is in the prompt",
    "alias": "{0} is another name of {1}",
    "style": "{0} is a name of the look {1}",
    "synonym": "{0} is a synonym of its name {1}",
    "member": "{0} is a kind of its {1}",
    "kind": "{1} is a kind of {0}",
    "tag": "its tag {1} is in the prompt",
    "phrase": "its captions say {1}",
    "head": "{0} is a part of its name {1}",
    "keyword": "{0} is a keyword of its {1}",
}


@dataclass(frozen=True)
class Hit:
    """A LoRA that was found.

    Attributes:
        name: Its name in the pool.
        score: Probability that the prompt asks for it, in [0, 1].
        why: The strongest reason, in words.
        title: Its name for people.
        channels: Probability by channel, were it alone.
        concepts: Words of the prompt that it answers.
        kind: What it is for: ``subject``, ``style``, ``character``, ``clothing``, ``pose``,
            ``background`` or ``helper``.
    """

    name: str
    score: float
    why: str
    title: str = ""
    channels: Mapping[str, float] = field(default_factory=dict)
    concepts: tuple[str, ...] = ()
    kind: str = "subject"


@dataclass(frozen=True)
class Evidence:
    """What a run of words says about a LoRA.

    Attributes:
        lora: Position of the record.
        concept: Number of the run.
        probability: That the run asks for the LoRA.
        why: The strongest reason in words.
        channels: Probability by channel, were it alone: ``words``, ``texts``, ``weights``.
        literal: Whether the run as a whole hangs together with a name.
    """

    lora: int
    concept: int
    probability: float
    why: str = ""
    channels: Mapping[str, float] = field(default_factory=dict)
    literal: bool = False


@dataclass
class Findings:
    """All that was found for a prompt.

    Attributes:
        words: Words of the prompt, and behind them those of the negative prompt.
        concepts: Its runs of words.
        evidence: What they say about LoRAs.
        understood: The prompt in the text encoder's language.
        near: Highest cosine of each LoRA's metadata with any run, which orders what nothing
            speaks for.
    """

    words: list[Word]
    concepts: list[Concept]
    evidence: list[Evidence]
    understood: Understood = field(default_factory=lambda: Understood(""))
    near: dict[int, float] = field(default_factory=dict)


@dataclass
class Pair:
    """Features of a run of words and a LoRA, and what to say of each channel."""

    features: dict[str, float] = field(default_factory=dict)
    why: dict[str, tuple[float, str]] = field(default_factory=dict)
    literal: bool = False

    def relate(self, match: Match, why: str) -> None:
        """Keep the strongest relation of the words to a name."""
        before = [name for name in _SAID if name in self.features]
        order = list(_SAID)
        if before and order.index(before[0]) < order.index(match.relation):
            return
        if before and before[0] != match.relation:
            del self.features[before[0]]
            del self.why["words"]
        self.literal = True
        self.note(match.relation, match.value, "words", why)

    def note(self, name: str, value: float, channel: str, why: str) -> None:
        """Keep the highest value of a feature, and of a channel the reason of the highest."""
        if value > self.features.get(name, 0.0):
            self.features[name] = value
            if value >= self.why.get(channel, (0.0, ""))[0]:
                self.why[channel] = (value, why)


class Searcher:
    """Finds LoRAs of an index for prompts.

    Args:
        index: The pool's index.
        text_encoder: Encodes prompts; the one that the index was made with.
        retriever: The trained encoders; without them only metadata is searched.
    """

    def __init__(
        self, index: PoolIndex, text_encoder: TextEncoder, retriever: Retriever | None = None
    ) -> None:
        check_text_encoder(index.provenance.text_encoder, text_encoder)
        if retriever is not None:
            check_text_encoder(retriever.spec.text_encoder, text_encoder)
            if retriever.dim != index.provenance.dim and index.provenance.dim:
                raise RetrievalError(
                    f"The index holds vectors of length {index.provenance.dim}, the retriever "
                    f"gives {retriever.dim}; run autolora index --rebuild."
                )
        self.index = index
        self.text_encoder = text_encoder
        self.retriever = retriever if index.provenance.dim else None
        self.names = NameIndex(index.texts)
        self.with_text = {row.lora for row in index.texts}
        self._known = np.full(index.channel_size("weights"), np.nan, np.float32)

    def search(self, prompt: str, k: int = 5, negative: str = "") -> list[Hit]:
        """Rank the pool.

        Args:
            prompt: What is wanted.
            k: How many hits at most.
            negative: What is not wanted.

        Returns:
            Hits, best first; what the prompts ask to leave out is not among them.

        Raises:
            RetrievalError: An empty prompt, or k below 1.
        """
        if k < 1:
            raise RetrievalError(f"The number of hits must be at least 1, not {k}.")
        findings = self.find(prompt, negative)
        scores = wanted(findings)
        near = findings.near
        order = sorted(scores, key=lambda i: (-round(scores[i], 3), -near.get(i, 0.0), i))
        return [self.hit(i, findings) for i in order[:k]]

    def find(self, prompt: str, negative: str = "") -> Findings:
        """Collect what every channel says.

        Args:
            prompt: What is wanted, in any language.
            negative: What is not wanted.

        Returns:
            The findings.

        Raises:
            RetrievalError: An empty prompt.
        """
        findings, pairs = self.collect(prompt, negative)
        findings.evidence = self._judge(pairs)
        return findings

    def collect(
        self, prompt: str, negative: str = ""
    ) -> tuple[Findings, dict[tuple[int, int], Pair]]:
        """Collect the features that `find` judges by, by run of words and LoRA."""
        if not prompt.strip():
            raise RetrievalError("The prompt is empty; say what the picture shall show.")
        # A terminal in another encoding hands over lone surrogates, which tokenizers refuse.
        prompt, negative = (t.encode("utf-8", "replace").decode() for t in (prompt, negative))
        understood = understand(prompt)
        text = understood.text
        if understood.language != "en" and getattr(self.text_encoder, "multilingual", False):
            # What an encoder of several languages knows, it may know better than word by word.
            text = text if "without" in text else f"{text}, {prompt}"
        words = read_words(text, self.names.vocabulary)
        if negative.strip():
            left_out = read_words(understand(negative).text, self.names.vocabulary, negated=True)
            words = [*words, Word("\n", "\n", "stop"), *left_out]
        concepts = find_concepts(words)
        findings = Findings(words, concepts, [], understood)
        pairs: dict[tuple[int, int], Pair] = {}
        self._look_at_words(words, concepts, pairs)
        texts = [concept.text for concept in concepts]
        if texts:
            vectors = self.text_encoder.encode(texts)
            self._look_at_texts(findings, vectors, pairs)
            self._look_at_weights(concepts, vectors, pairs)
        _weigh_length(words, pairs)
        return findings, pairs

    def _look_at_words(
        self,
        words: list[Word],
        concepts: list[Concept],
        pairs: dict[tuple[int, int], Pair],
    ) -> None:
        number = {(c.start, c.end): i for i, c in enumerate(concepts)}
        compounds = find_compounds(words)
        for match in self.names.find(words):
            run = words[match.start : match.end]
            covers = tuple(match.start + i for i, w in enumerate(run) if w.role != "stop")
            place = (match.start, match.end)
            if place not in number:
                number[place] = len(concepts)
                text = " ".join(word.text for word in run)
                concepts.append(Concept(text, covers, *place, run[0].negated))
            elif match.relation in ("name", "alias", "style"):
                # A name answers the colours in it, too, so that "red neon" says more than "neon".
                concepts[number[place]] = replace(concepts[number[place]], covers=covers)
            pair = pairs.setdefault((number[place], match.lora), Pair())
            typed = shown(" ".join(word.text for word in run))
            why = _SAID[match.relation].format(f'"{typed}"', f'"{shown(match.text)}"')
            pair.relate(match, why)
            pair.features |= self._circumstances(match, words, compounds)

    def _circumstances(
        self, match: Match, words: Sequence[Word], compounds: Sequence[tuple[int, int, str]]
    ) -> dict[str, float]:
        """Why a word may not mean what it names."""
        run = words[match.start : match.end]
        found: dict[str, float] = {}
        if any(_is_spelled(word) for word in run):
            found["spelled"] = 1.0
        if self.names.kind(match.lora) == "style":
            return found
        if all(word.verb for word in run):
            found["verb"] = 1.0
        after = words[match.end] if match.end < len(words) else None
        follows = after is not None and after.role == "content" and not after.verb
        if after is not None and follows and lexicon().is_noun(after.stem):
            found["modifier"] = float(not self.names.named(after.stem))
        place = (match.start, match.end)
        if any(
            start <= match.start
            and match.end <= end
            and (start, end) != place
            and not self._is_kind_of(phrase, match.lora)
            for start, end, phrase in compounds
        ):
            found["compound"] = 1.0
        return found

    def _is_in_compound(
        self, concept: Concept, lora: int, compounds: Sequence[tuple[int, int, str]]
    ) -> bool:
        """Whether a run shares words with a fixed expression for something else."""
        return any(
            concept.start < end and start < concept.end and not self._is_kind_of(phrase, lora)
            for start, end, phrase in compounds
        )

    def _is_kind_of(self, phrase: str, lora: int) -> bool:
        """Whether a fixed expression names a kind of what a LoRA draws: a guide dog is a dog."""
        if self.names.is_name(phrase, lora):
            return True
        own = self.names.synsets.get(lora, set())
        for synset in lexicon().synsets(phrase):
            if synset in own:
                return True
            if any(kind in own for kind, _ in lexicon().ancestors(synset)):
                return True
        return False

    def _look_at_texts(
        self,
        findings: Findings,
        vectors: torch.Tensor,
        pairs: dict[tuple[int, int], Pair],
    ) -> None:
        words, concepts = findings.words, findings.concepts
        scale = self._scale()
        compounds = find_compounds(words)
        results = self.index.search("texts", vectors.numpy(), CANDIDATES)
        nearest: dict[int, tuple[float, int, int]] = {}
        for number, result in enumerate(results):
            for lora, similarity, row in result:
                nearest[lora] = max(nearest.get(lora, (-1.0, 0, 0)), (similarity, number, row))
            concept = concepts[number]
            run = words[concept.start : concept.end]
            unknown = any(word.unknown for word in run)
            clause = concept.end - concept.start > 3
            own: list[int] | None = None
            alone = False
            first, lead = _lead([(lora, scale(similarity)) for lora, similarity, _ in result])
            for lora, similarity, row in result:
                cosine = scale(similarity)
                if cosine <= COSINE_FLOOR:
                    continue
                text = self.index.texts[row]
                feature = _TEXT_FEATURE[text.kind]
                pair = pairs.setdefault((number, lora), Pair())
                if pair.literal and _NAMED & pair.features.keys():
                    continue  # said more surely already
                why = _nearness(concept, text, similarity)
                pair.note(feature, cosine_feature(cosine), "texts", why)
                if lora == first:
                    pair.features["cos_lead"] = lead
                style = self.names.kind(lora) == "style"
                if style:
                    pair.features["is_style"] = 1.0
                pair.features |= {"unknown": float(unknown), "clause": float(clause)}
                if (
                    not pair.literal
                    and not style
                    and self._is_in_compound(concept, lora, compounds)
                ):
                    pair.features["unrelated"] = 1.0
                if own is None:
                    phrase = " ".join(word.stem for word in run)
                    own = lexicon().synsets(phrase)
                    # Nor does an adjective name a look that it is merely near to.
                    alone = len(run) == 1 and lexicon().is_word(run[0].text)
                # A noun that English knows means itself and not what it is near to.
                known = bool(own and self.names.synsets.get(lora)) or (style and (own or alone))
                if known and not pair.literal:
                    pair.features["unrelated"] = 1.0
                if pair.features.keys() & {"unrelated", "compound"}:
                    pair.features.pop("cos_lead", None)

        # Whatever is nearest is listed at the end of a ranking, though nothing speaks for it.
        seen = {lora for _, lora in pairs}
        for lora, (similarity, number, row) in nearest.items():
            if lora not in seen and not concepts[number].negated:
                why = _nearness(concepts[number], self.index.texts[row], similarity)
                pairs[number, lora] = Pair(why={"texts": (0.0, why)})
        findings.near = {lora: similarity for lora, (similarity, _, _) in nearest.items()}

    def _scale(self) -> Callable[[float], float]:
        """Brings the text encoder's cosines to the scale of MiniLM's."""
        if not hasattr(self.text_encoder, "logistic"):
            return lambda similarity: similarity
        measured = self.text_encoder.logistic
        if measured is None:
            # Without anything to compare with, similarities choose nothing.
            return lambda similarity: COSINE_FLOOR + 0.1 * max(similarity, 0.0)
        centre, slope = MINILM
        return lambda similarity: centre + measured.slope * (similarity - measured.centre) / slope

    def _look_at_weights(
        self,
        concepts: list[Concept],
        vectors: torch.Tensor,
        pairs: dict[tuple[int, int], Pair],
    ) -> None:
        retriever = self.retriever
        if retriever is None or not self.index.channel_size("weights"):
            return
        # A clause is near to whatever is near to one of its words.
        runs = [i for i, c in enumerate(concepts[: len(vectors)]) if c.end - c.start <= MAX_RUN]
        if not runs:
            return
        queries = retriever.encode_text(vectors[runs])
        results = self.index.search("weights", queries.numpy(), CANDIDATES)
        owner = {row: lora for result in results for lora, _, row in result}
        rows = np.array(sorted(owner), np.int64)
        loras = torch.from_numpy(self.index.vectors("weights", rows))
        if retriever.calibrated:
            odds = retriever.judge(queries, loras, self._known_log_odds(rows, loras))
            odds = odds - _logit(retriever.calibration.threshold)
        else:
            # Without anything to compare with, similarities only order the pool.
            odds = ((queries @ loras.T).clamp(1e-4, 1) * 0.49).logit()
        column = {int(row): i for i, row in enumerate(rows)}
        table = odds.numpy()
        for query, result in enumerate(results):
            number = runs[query]
            for lora, similarity, row in result:
                value = float(table[query, column[row]])
                if value < -_WEIGHTS_FLOOR and lora in self.with_text:
                    continue
                pair = pairs.setdefault((number, lora), Pair())
                said = shown(concepts[number].text)
                pair.features["weights"] = value
                why = f'its weights look like "{said}" ({similarity:.2f})'
                pair.why["weights"] = (value, why)

    def _known_log_odds(self, rows: np.ndarray, loras: torch.Tensor) -> torch.Tensor:
        """`Retriever.known_log_odds` of rows of the weight channel, computed once for each."""
        assert self.retriever is not None
        new = np.isnan(self._known[rows])
        if new.any():
            found = self.retriever.known_log_odds(loras[torch.from_numpy(new)])
            self._known[rows[new]] = found.numpy()
        return torch.from_numpy(self._known[rows])

    def _judge(self, pairs: Mapping[tuple[int, int], Pair]) -> list[Evidence]:
        if not pairs:
            return []
        rows = feature_rows(pairs.values())
        parts = rows * learned()
        alone = {
            "words": parts[:, 0] + parts[:, _COLUMNS["words"]].sum(1),
            "texts": parts[:, 0] + parts[:, _COLUMNS["texts"]].sum(1),
            "weights": parts[:, 0] + parts[:, _COLUMNS["weights"]].sum(1),
        }
        together = probability(rows)
        found = []
        for place, ((number, lora), pair) in enumerate(pairs.items()):
            if lora in self.with_text:
                p = float(together[place])
                channels = {c: _sigmoid(float(alone[c][place])) for c in pair.why}
                strongest = max(pair.why, key=lambda c: alone[c][place])
            else:
                p = _sigmoid(pair.features.get("weights", -30.0))
                channels, strongest = {"weights": p}, "weights"
            why = pair.why[strongest][1]
            found.append(Evidence(lora, number, p, why, channels, pair.literal))
        return found

    def hit(self, lora: int, findings: Findings, words: Collection[int] = ()) -> Hit:
        """Describe a LoRA that was found.

        Args:
            lora: Position of the record.
            findings: What was found.
            words: Positions of the words that it was taken for; all where there are none.

        Returns:
            The hit with its strongest reason.
        """
        own = [item for item in findings.evidence if item.lora == lora]
        own = [item for item in own if not findings.concepts[item.concept].negated]
        asked = set(words)
        if asked:
            own = [item for item in own if asked & set(findings.concepts[item.concept].covers)]
        best = max(own, key=lambda item: item.probability)
        channels: dict[str, float] = {}
        for item in own:
            for channel, p in item.channels.items():
                channels[channel] = max(channels.get(channel, 0.0), p)
        record = self.index.records[lora]
        covers = sorted(asked) if asked else findings.concepts[best.concept].covers
        said = tuple(findings.words[i].text for i in covers)
        kind = self.names.kind(lora)
        return Hit(record.name, best.probability, best.why, record.title, channels, said, kind)


_NAMED = {"name", "alias", "style"}
_TEXT_FEATURE = {
    "title": "cos_title",
    "trigger": "cos_title",
    "tag": "cos_tag",
    "phrase": "cos_tag",
    "look": "cos_look",
    "description": "cos_description",
    "captions": "cos_captions",
}
_COLUMNS = {
    "words": [i for i, name in enumerate(FEATURES) if name in WORDS],
    "texts": [i for i, name in enumerate(FEATURES) if name in TEXTS],
    "weights": [FEATURES.index("weights")],
}


def feature_rows(pairs: Iterable[Pair]) -> np.ndarray:
    """Features ``[n, F]`` of pairs; the encoder's log-odds count from its floor."""
    rows = []
    for pair in pairs:
        features = dict(pair.features)
        if "weights" in features:
            features["weights"] = min(max(features["weights"] + _WEIGHTS_FLOOR, 0.0), 6.0)
        rows.append(vector(features))
    return np.array(rows).reshape(-1, len(FEATURES))


def _nearness(concept: Concept, text: TextRow, similarity: float) -> str:
    said = shown(text.text.partition("\n")[0], 60)
    kind = "captions are" if text.kind == "captions" else f"{text.kind} is"
    return f'{kind} close to "{shown(concept.text)}" ({similarity:.2f}): "{said}"'


def _weigh_length(words: Sequence[Word], pairs: Mapping[tuple[int, int], Pair]) -> None:
    """Note where one word of many is less sure to ask for a LoRA than one of a few."""
    said = sum(word.role == "content" and not word.negated for word in words)
    length = min(max((said - SHORT) / (LONG - SHORT), 0.0), 1.0)
    for pair in pairs.values() if length else ():
        for name in ("kind", "keyword"):
            if name in pair.features:
                pair.features["kind_long"] = length * pair.features[name]
        if not pair.literal:
            pair.features["near_long"] = length


def _lead(found: Sequence[tuple[int, float]]) -> tuple[int, float]:
    """The nearest LoRA, and by how much it is nearer than any other, from 0 to 1."""
    if not found:
        return -1, 0.0
    first, best = found[0]
    second = next((cosine for lora, cosine in found if lora != first), 0.0)
    lead = min(max(best - second, 0.0) / LARGEST_LEAD, 1.0)
    return first, lead * cosine_feature(best) ** 0.5


def _sigmoid(logit: float) -> float:
    return 1 / (1 + math.exp(-min(max(logit, -30.0), 30.0)))


def _logit(probability: float) -> float:
    return math.log(probability / (1 - probability))


def _is_spelled(word: Word) -> bool:
    return lexicon().lemma(word.text) != word.stem


def find_compounds(words: Sequence[Word]) -> list[tuple[int, int, str]]:
    """Fixed expressions in a prompt: positions of first word and end, and the lemmas."""
    found = []
    for start in range(len(words)):
        for end in range(start + 2, min(start + 6, len(words)) + 1):
            run = words[start:end]
            if any(word.text == "\n" for word in run):
                break
            for phrase in {" ".join(w.stem for w in run), " ".join(_bare(w.text) for w in run)}:
                if lexicon().is_compound(phrase):
                    found.append((start, end, phrase))
    return found


def _bare(word: str) -> str:
    return word.replace("'", "").replace("\u2019", "")


def wanted(findings: Findings) -> dict[int, float]:
    """Score of each LoRA that the prompt does not ask to leave out, by position of the record."""
    scores: dict[int, float] = {}
    against: dict[int, float] = {}
    for item in findings.evidence:
        table = against if findings.concepts[item.concept].negated else scores
        table[item.lora] = max(table.get(item.lora, 0.0), item.probability)
    # What is asked for by its very name is not left out for being akin to what shall not be there.
    return {
        lora: score
        for lora, score in scores.items()
        if against.get(lora, 0.0) < THRESHOLD or against[lora] < score - 0.1
    }


def choose(
    searcher: Searcher,
    prompt: str,
    k: int = 3,
    *,
    taken: Collection[str] = (),
    threshold: float = THRESHOLD,
    negative: str = "",
) -> list[Hit]:
    """Choose LoRAs for a prompt.

    Args:
        searcher: The pool.
        prompt: What is wanted.
        k: How many LoRAs at most.
        taken: Names that are attached anyway; what they answer is not answered again.
        threshold: Probability from which a word counts as answered.
        negative: What is not wanted.

    Returns:
        Hits in the order in which they were taken; empty when nothing fits.

    Raises:
        RetrievalError: An empty prompt, or k below 1.
    """
    if k < 1:
        raise RetrievalError(f"The number of LoRAs must be at least 1, not {k}.")
    findings = searcher.find(prompt, negative)
    answers = answered_words(findings, threshold)
    records = searcher.index.records
    open_words = {word for scores in answers.values() for word in scores}
    for lora, scores in answers.items():
        if records[lora].name in taken:
            open_words -= set(scores)
    fits = wanted(findings)
    rest = {
        lora: scores
        for lora, scores in answers.items()
        if lora in fits and records[lora].name not in taken and _is_asked(searcher, findings, lora)
    }
    things = {i for i, word in enumerate(findings.words) if word.role == "content"}
    named = {
        word
        for item in findings.evidence
        if item.probability >= threshold
        for word in findings.concepts[item.concept].covers
        if item.literal or findings.words[word].role != "content"
    }
    chosen = greedy_cover(rest, open_words, k, _duplicates(searcher, rest), things | named)
    return [searcher.hit(lora, findings, words) for lora, words in chosen]


def _is_asked(searcher: Searcher, findings: Findings, lora: int) -> bool:
    """Whether a LoRA that helps rather than draws is asked for by its name; others always are."""
    if searcher.names.kind(lora) != "helper":
        return True
    return any(item.literal for item in findings.evidence if item.lora == lora)


def answered_words(findings: Findings, threshold: float = THRESHOLD) -> dict[int, dict[int, float]]:
    """How well each LoRA answers each word.

    Evidence of a run that hangs together with a name answers all its words; of a run that is
    merely near in meaning, the words that are near themselves, where one is: an elephant doesn't
    answer "neon" because "neon elephant" is near to it.

    Args:
        findings: What was found.
        threshold: Probability from which a word counts as answered.

    Returns:
        By position of the record, then of the word, probabilities of at least the threshold.
    """
    alone: dict[tuple[int, int], float] = {}
    for item in findings.evidence:
        concept = findings.concepts[item.concept]
        if item.literal or concept.end - concept.start == 1:
            for word in concept.covers:
                key = (item.lora, word)
                alone[key] = max(alone.get(key, 0.0), item.probability)
    result: dict[int, dict[int, float]] = {}
    for item in findings.evidence:
        concept = findings.concepts[item.concept]
        if concept.negated or item.probability < threshold:
            continue
        singles = {word: alone.get((item.lora, word), 0.0) for word in concept.covers}
        best = max(singles.values(), default=0.0)
        scores = result.setdefault(item.lora, {})
        for word in concept.covers:
            explained = not item.literal and best >= _EXPLAINED
            p = item.probability * (singles[word] / best if explained else 1.0)
            if p >= threshold:
                scores[word] = max(scores.get(word, 0.0), p)
    return {lora: scores for lora, scores in result.items() if scores}


def greedy_cover(
    answers: Mapping[int, Mapping[int, float]],
    open_words: Collection[int],
    k: int,
    duplicates: Mapping[int, Collection[int]],
    things: Collection[int] | None = None,
) -> list[tuple[int, tuple[int, ...]]]:
    """Take LoRAs one after another by what they add.

    Args:
        answers: As `answered_words` gives them.
        open_words: Words that are still to be answered.
        k: How many LoRAs at most.
        duplicates: LoRAs that are nearly the same, by LoRA.
        things: Words of which a LoRA must add one to be taken; all when None. The others only
            make a LoRA that answers them too come before one that does not.

    Returns:
        LoRAs with the words that each was taken for.
    """
    left = set(open_words)
    candidates = set(answers)
    chosen: list[tuple[int, tuple[int, ...]]] = []
    while left and candidates and len(chosen) < k:
        gains = {lora: _gain(answers[lora], left, things) for lora in candidates}
        best = min(candidates, key=lambda lora: (-round(sum(gains[lora].values()), 4), lora))
        if not gains[best]:
            break
        chosen.append((best, tuple(sorted(gains[best]))))
        left -= set(gains[best])
        candidates -= {best, *duplicates.get(best, ())}
    return chosen


def _gain(
    answers: Mapping[int, float], left: Collection[int], things: Collection[int] | None
) -> dict[int, float]:
    """What a LoRA adds by word; nothing where it adds no thing."""
    added = {word: answers[word] for word in left if word in answers}
    return added if things is None or any(word in things for word in added) else {}


def _duplicates(searcher: Searcher, loras: Collection[int]) -> dict[int, set[int]]:
    """Candidates with the same content, or vectors that can hardly be told apart."""
    records = searcher.index.records
    same: dict[int, set[int]] = {}
    ordered = sorted(lora for lora in loras if records[lora].vector is not None)
    rows = np.array([records[lora].vector for lora in ordered], np.int64)
    if len(ordered) > 1:
        vectors = searcher.index.vectors("weights", rows)
        for i, j in np.argwhere(vectors @ vectors.T > NEAR_DUPLICATE):
            if i != j:
                same.setdefault(ordered[i], set()).add(ordered[j])
    by_sha: dict[str, list[int]] = {}
    for lora in loras:
        by_sha.setdefault(records[lora].sha256, []).append(lora)
    for sha, group in by_sha.items():
        for lora in group if sha else ():
            same.setdefault(lora, set()).update(other for other in group if other != lora)
    return same
