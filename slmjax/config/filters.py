"""Filters: stages that decide on a document by itself, from what is measured of it. Some also change its text.

min_x and max_x are inclusive bounds on the measured attribute x, only_x are the values that it may have, and these are
the names of the reasons to drop. They do not change what is measured, so that other bounds re-use the measurements of
an earlier run. None is no bound.
"""

import dataclasses
from typing import Literal

from slmjax.config.check import fraction, not_negative, positive, require

# What a word is: what stands between white space; letters, marks and digits in a row, and each character of scripts
# without spaces; or the tokens that datatrove counts in English, which are spaCy's, punctuation among them.
Splitter = Literal["whitespace", "unicode", "datatrove"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class LengthFilterConfig:
    """Bounds on the characters and on the words of a document."""

    min_chars: int | None = None
    max_chars: int | None = None
    min_words: int | None = None
    max_words: int | None = None
    splitter: Splitter = "whitespace"

    def __post_init__(self):
        positive(self, "min_chars", "max_chars", "min_words", "max_words")


@dataclasses.dataclass(frozen=True, kw_only=True)
class LineFilterConfig:
    """Rules on lines, empty ones not counted, such as those of StarCoder (arXiv:2305.06161) and Gopher.

    Attributes:
      min_lines, max_lines: number of lines.
      max_mean_line_chars: mean length of a line.
      max_line_chars: length of the longest line.
      max_long_line_share: share of the characters in lines longer than `long_line_chars`.
      max_bullet_line_share: share of lines that start with a bullet.
      max_ellipsis_line_share: share of lines that end with an ellipsis.
    """

    min_lines: int | None = None
    max_lines: int | None = None
    max_mean_line_chars: float | None = None
    max_line_chars: int | None = None
    max_long_line_share: float | None = None
    max_bullet_line_share: float | None = None
    max_ellipsis_line_share: float | None = None
    long_line_chars: int = 1000

    def __post_init__(self):
        positive(self, "min_lines", "max_lines", "max_mean_line_chars", "max_line_chars", "long_line_chars")
        fraction(self, "max_long_line_share", "max_bullet_line_share", "max_ellipsis_line_share")


@dataclasses.dataclass(frozen=True, kw_only=True)
class CharacterFilterConfig:
    """Rules on the kinds of characters.

    Attributes:
      min_alphabetic_share: share of letters (of any script) among the characters that are not white space.
      max_digit_share: share of ASCII digits among the same.
      max_symbols_per_word: hash signs and ellipses for every word (Gopher, arXiv:2112.11446, table A1: 0.1).
    """

    min_alphabetic_share: float | None = None
    max_digit_share: float | None = None
    max_symbols_per_word: float | None = None
    splitter: Splitter = "whitespace"

    def __post_init__(self):
        fraction(self, "min_alphabetic_share", "max_digit_share")


@dataclasses.dataclass(frozen=True, kw_only=True)
class RepetitionFilterConfig:
    """Repetition rules of Gopher (arXiv:2112.11446, table A1), whose thresholds are the defaults. None turns one off.

    Attributes:
      max_duplicate_line_share: lines that occurred before in the document, among its lines.
      max_duplicate_line_char_share: characters in such lines, among the document's characters.
      max_duplicate_paragraph_share: the same of paragraphs.
      max_duplicate_paragraph_char_share: the same of the characters in paragraphs.
      max_top_ngram_share: characters in the most frequent word 2-, 3- and 4-gram.
      max_duplicate_ngram_share: characters in word 5- to 10-grams that occurred before.
      counting: "paper" leaves blank lines and paragraphs out, measures n-grams by the characters in words and counts a
        character in several duplicate n-grams once; "datatrove" measures n-grams by all characters of the document,
        takes a top n-gram with its spaces and passes over a duplicate n-gram as a whole.
    """

    max_duplicate_line_share: float | None = 0.30
    max_duplicate_line_char_share: float | None = 0.20
    max_duplicate_paragraph_share: float | None = 0.30
    max_duplicate_paragraph_char_share: float | None = 0.20
    max_top_ngram_share: tuple[float, float, float] | None = (0.20, 0.18, 0.16)
    max_duplicate_ngram_share: tuple[float, float, float, float, float, float] | None = (
        0.15, 0.14, 0.13, 0.12, 0.11, 0.10,
    )  # fmt: skip
    splitter: Splitter = "whitespace"
    counting: Literal["paper", "datatrove"] = "paper"

    def __post_init__(self):
        fraction(
            self,
            "max_duplicate_line_share",
            "max_duplicate_line_char_share",
            "max_duplicate_paragraph_share",
            "max_duplicate_paragraph_char_share",
        )
        for name in ("max_top_ngram_share", "max_duplicate_ngram_share"):
            shares = getattr(self, name)
            in_range = shares is None or all(0 <= share <= 1 for share in shares)
            require(in_range, self, f"{name} must lie between 0 and 1, got {shares}")


@dataclasses.dataclass(frozen=True, kw_only=True)
class MarkerFilterConfig:
    """Counts which `markers` stand in the first `first_lines` lines, letter case aside: generated files have one."""

    max_markers: int = 0

    markers: tuple[str, ...] = (
        "do not edit",
        "auto-generated",
        "autogenerated",
        "automatically generated",
        "generated from",
    )
    first_lines: int = 10

    def __post_init__(self):
        not_negative(self, "max_markers")
        positive(self, "first_lines")
        require(all(self.markers), self, f"markers must not be empty strings, got {self.markers}")


@dataclasses.dataclass(frozen=True, kw_only=True)
class GopherFilterConfig:
    """Quality rules of Gopher (arXiv:2112.11446, A1.1), whose thresholds are the defaults, counted as datatrove does.

    Attributes:
      min_words, max_words: words of more than symbols.
      min_mean_word_chars, max_mean_word_chars: mean length of these.
      max_hashes_per_word: # for every word, symbols included.
      max_ellipses_per_word: the same of ... and its one character.
      max_bullet_line_share: lines that start with a bullet or hyphen, among all.
      max_ellipsis_line_share: lines that end with an ellipsis.
      min_alphabetic_word_share: words with a letter, among all words.
      min_stop_words: how many of `stop_words` occur.
    """

    min_words: int | None = 50
    max_words: int | None = 100_000
    min_mean_word_chars: float | None = 3.0
    max_mean_word_chars: float | None = 10.0
    max_hashes_per_word: float | None = 0.1
    max_ellipses_per_word: float | None = 0.1
    max_bullet_line_share: float | None = 0.9
    max_ellipsis_line_share: float | None = 0.3
    min_alphabetic_word_share: float | None = 0.8
    min_stop_words: int | None = 2
    stop_words: tuple[str, ...] = ("the", "be", "to", "of", "and", "that", "have", "with")
    splitter: Splitter = "whitespace"

    def __post_init__(self):
        positive(self, "min_words", "max_words", "min_mean_word_chars", "max_mean_word_chars")
        fraction(self, "max_bullet_line_share", "max_ellipsis_line_share", "min_alphabetic_word_share")
        one_word = all(len(word.split()) == 1 for word in self.stop_words)
        require(one_word, self, f"stop_words must be words without white space, got {self.stop_words}")
        number = len(self.stop_words)
        require(number <= 1000, self, f"stop_words must be at most 1,000 words, got {number:,}")


@dataclasses.dataclass(frozen=True, kw_only=True)
class FineWebFilterConfig:
    """Quality rules of FineWeb (arXiv:2406.17557, 3.6), whose thresholds are the defaults. Blank lines do not count.

    Attributes:
      min_terminal_line_share: lines that end with the punctuation of a sentence.
      max_short_line_share: lines of at most `short_line_chars` characters.
      max_duplicate_line_char_share: characters in lines that occurred before in the document.
      max_newlines_per_word: line feeds for every word.
    """

    min_terminal_line_share: float | None = 0.12
    max_short_line_share: float | None = 0.67
    max_duplicate_line_char_share: float | None = 0.01
    max_newlines_per_word: float | None = 0.3
    short_line_chars: int = 30
    splitter: Splitter = "whitespace"

    def __post_init__(self):
        fraction(self, "min_terminal_line_share", "max_short_line_share", "max_duplicate_line_char_share")
        positive(self, "short_line_chars")


@dataclasses.dataclass(frozen=True, kw_only=True)
class C4FilterConfig:
    """Rules of C4 (arXiv:1910.10683, 2.2) in the form of datatrove: removes lines, then drops documents.

    Lines keep no white space around them, blank ones go. The thresholds and rules that are the defaults are C4's;
    FineWeb uses require_terminal = False.

    Attributes:
      min_sentences: sentences in the lines that are left.
      max_lorem_ipsum, max_curly_brackets: lines with "lorem ipsum" or "{".
      require_terminal: remove lines that do not end with one of . ? ! and quotation marks, or end with an ellipsis.
      line_words: remove lines of fewer words.
      word_chars: remove lines with a longer word.
      remove_javascript: remove lines with "javascript".
      policy_phrases: remove lines with one of these. In all phrases the case of ASCII letters does not matter.
      remove_citations: cut [1], [edit] and [citation needed].
      sentences: "punctuation" ends a sentence at a word with a stop, and at the end of a line; "datatrove" counts as
        spaCy's sentencizer does.
    """

    min_sentences: int | None = 5
    max_lorem_ipsum: int | None = 0
    max_curly_brackets: int | None = 0
    require_terminal: bool = True
    line_words: int = 3
    word_chars: int = 1000
    remove_javascript: bool = True
    policy_phrases: tuple[str, ...] = (
        "terms of use",
        "privacy policy",
        "cookie policy",
        "uses cookies",
        "use of cookies",
        "use cookies",
    )
    remove_citations: bool = True
    sentences: Literal["punctuation", "datatrove"] = "punctuation"

    def __post_init__(self):
        positive(self, "min_sentences", "line_words", "word_chars")
        _check_phrases(self, "policy_phrases")


@dataclasses.dataclass(frozen=True, kw_only=True)
class C4ParagraphFilterConfig:
    """Rule of mC4 (Xue et al. 2021, arXiv:2010.11934): a page has at least three lines of 200 characters or more.

    `min_long_line_chars` bounds the length of the `lines`-th longest line.
    """

    min_long_line_chars: int | None = 200
    lines: int = 3

    def __post_init__(self):
        positive(self, "min_long_line_chars", "lines")


@dataclasses.dataclass(frozen=True, kw_only=True)
class BoilerplateFilterConfig:
    """Line-wise corrections of RefinedWeb (arXiv:2306.01116, G.2), in the form of DCLM (arXiv:2406.11794).

    Removes lines that are mainly capitals, only digits, only a count (such as "3 likes") or a single word, and phrases
    from short lines; then drops documents of which too much went.

    Attributes:
      max_removed_word_share: words that went, among all.
      uppercase_share: lines of which more of the characters are capitals go.
      phrase_line_words: lines of at most so many words lose the phrases.
      prefixes, suffixes, phrases: which are cut at the start, at the end, anywhere, whatever the case of letters.
    """

    max_removed_word_share: float | None = 0.05
    uppercase_share: float = 0.5
    phrase_line_words: int = 10
    prefixes: tuple[str, ...] = ("sign-in",)
    suffixes: tuple[str, ...] = ("read more...",)
    phrases: tuple[str, ...] = ("items in cart",)

    def __post_init__(self):
        fraction(self, "max_removed_word_share", "uppercase_share")
        positive(self, "phrase_line_words")
        _check_phrases(self, "prefixes", "suffixes", "phrases")


@dataclasses.dataclass(frozen=True, kw_only=True)
class BadWordFilterConfig:
    """Rule of C4 (arXiv:1910.10683, 2.2): no page with a word of a list, such as LDNOOBW's.

    Attributes:
      max_bad_words: how often words of the list occur, whatever the case of letters.
      words: the list, or a part of it; may have phrases.
      path: file with a word or phrase on each line, more of the list; environment variables and ~ are expanded.
      whole_words: neither a letter nor a digit stands before or after. False for languages without spaces.
    """

    max_bad_words: int | None = 0
    words: tuple[str, ...] = ()
    path: str | None = None
    whole_words: bool = True

    def __post_init__(self):
        require(bool(self.words) or self.path is not None, self, "words or path must name what to look for")
        _check_phrases(self, "words")


@dataclasses.dataclass(frozen=True, kw_only=True)
class LanguageFilterConfig:
    """Keeps documents in some languages, by the naive Bayes model that the package py3langid has with it.

    Attributes:
      only_language: ISO 639-1 codes of the languages; "zxx" has none, such as source code.
      min_language_score: probability of the most likely one. FineWeb's 0.65 is for another model, fastText's lid.176.
      sample_bytes: of each document is looked at; of longer ones `sample_parts` parts from all over the text.
    """

    only_language: tuple[str, ...] | None = ("en",)
    min_language_score: float | None = 0.5
    sample_bytes: int = 512
    sample_parts: int = 4

    def __post_init__(self):
        fraction(self, "min_language_score")
        positive(self, "sample_bytes", "sample_parts")
        fits = self.sample_bytes >= 16 * self.sample_parts
        require(fits, self, f"sample_bytes must be at least 16 for each of {self.sample_parts} parts")


@dataclasses.dataclass(frozen=True, kw_only=True)
class EncodedDataFilterConfig:
    """Rules of StarCoder2 (arXiv:2402.19173, 2.3) on base64, hexadecimal bytes and Unicode escapes in source code.

    Attributes:
      max_encoded_chars: characters in the longest run of such data.
      max_encoded_share: characters in all runs, among the document's.
    """

    max_encoded_chars: int | None = 1024
    max_encoded_share: float | None = 0.5

    def __post_init__(self):
        positive(self, "max_encoded_chars")
        fraction(self, "max_encoded_share")


@dataclasses.dataclass(frozen=True, kw_only=True)
class MathFilterConfig:
    r"""Rules of OpenWebMath (arXiv:2310.06786, 3) for pages with mathematics, from which FineMath starts too.

    Attributes:
      min_math_marks: formulas, commands and symbols together.
      min_formulas: in $ $, $$ $$, \( \), \[ \] and MathML.
      min_latex_commands: commands of `commands`.
      max_accented_share: accented Latin letters among the characters: mathematics in other languages.
    """

    min_math_marks: int | None = 1
    min_formulas: int | None = None
    min_latex_commands: int | None = None
    max_accented_share: float | None = 0.015
    commands: tuple[str, ...] = (
        *("frac", "dfrac", "tfrac", "sqrt", "sum", "prod", "int", "oint", "lim", "partial", "nabla", "infty"),
        *("begin", "end", "left", "right", "label", "ref", "eqref", "nonumber", "item", "text", "mathrm"),
        *("mathbf", "mathbb", "mathcal", "mathfrak", "operatorname", "overline", "hat", "tilde", "vec", "bar"),
        *("times", "cdot", "ldots", "cdots", "pm", "leq", "geq", "le", "ge", "neq", "approx", "equiv", "sim"),
        *("in", "notin", "subset", "subseteq", "cup", "cap", "forall", "exists", "rightarrow", "to", "mapsto"),
        *("alpha", "beta", "gamma", "delta", "epsilon", "varepsilon", "zeta", "eta", "theta", "lambda", "mu"),
        *("nu", "xi", "pi", "rho", "sigma", "tau", "phi", "varphi", "chi", "psi", "omega", "Gamma", "Delta"),
        *("Theta", "Lambda", "Sigma", "Phi", "Psi", "Omega", "sin", "cos", "tan", "log", "ln", "exp"),
    )

    def __post_init__(self):
        fraction(self, "max_accented_share")
        _check_phrases(self, "commands")


PersonalData = Literal["secret", "email", "ip", "card", "phone"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class MaskPersonalDataConfig:
    """Replaces personal data in the text by <SECRET>, <EMAIL>, <IP>, <CARD> and <PHONE>; drops nothing.

    Secrets are keys and tokens that are known by their form (of AWS, GitHub, GitLab, Slack, Stripe, Google, OpenAI,
    Anthropic, Hugging Face, npm, PyPI, SendGrid; JSON web tokens; passwords in addresses; private keys in PEM). Cards
    have the first digits and the length of an issuer and a right Luhn checksum (ISO/IEC 7812). Phone numbers are
    international, starting with +, or North American with separators.

    Attributes:
      kinds: what is replaced.
      public_ips_only: leave addresses that are not routed publicly, such as 10.0.0.1.
    """

    kinds: tuple[PersonalData, ...] = ("secret", "email", "ip", "card", "phone")
    public_ips_only: bool = True

    def __post_init__(self):
        require(len(self.kinds) > 0, self, "kinds needs at least one kind, got ()")
        require(len(self.kinds) == len(set(self.kinds)), self, f"kinds must differ, got {self.kinds}")


# These change texts, and come before stages that look at the whole corpus.
RewriteConfig = C4FilterConfig | BoilerplateFilterConfig | MaskPersonalDataConfig
FilterConfig = (
    LengthFilterConfig
    | LineFilterConfig
    | CharacterFilterConfig
    | RepetitionFilterConfig
    | MarkerFilterConfig
    | GopherFilterConfig
    | FineWebFilterConfig
    | C4FilterConfig
    | C4ParagraphFilterConfig
    | BoilerplateFilterConfig
    | BadWordFilterConfig
    | LanguageFilterConfig
    | EncodedDataFilterConfig
    | MathFilterConfig
    | MaskPersonalDataConfig
)


def _check_phrases(config: object, *names: str) -> None:
    for name in names:
        phrases = getattr(config, name)
        one_line = all(phrase.strip() and "\n" not in phrase for phrase in phrases)
        require(one_line, config, f"{name} must be neither blank nor of several lines, got {phrases}")
