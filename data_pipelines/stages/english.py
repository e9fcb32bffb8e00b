# ruff: noqa: RUF001, SIM905 (characters that look like others are meant; lists of words read better in a string)
"""Words as datatrove counts them in English: the rules of spaCy's tokenizer, without spaCy.

What stands between white space is cut from outside to inside: prefixes and suffixes as long as there are any, then at
infixes; contractions and abbreviations are exceptions. Letters are those of str.isalpha, where spaCy has a list of
scripts, exceptions are not looked for across white
space, and strings of more than 2,048 characters are no addresses.
"""

import functools
import itertools
import re
import string
import unicodedata

_QUOTES = "'\"”“`‘´’‚,„»«「」『』（）〔〕【】《》〈〉〈〉⟦⟧"
_PUNCTUATION = "… …… , : ; ! ? ¿ ؟ ¡ ( ) [ ] { } < > _ # * & 。 ？ ！ ， 、 ； ： ～ · । ، ۔ ؛ ٪".split()
_CURRENCIES = "$ £ € ¥ ฿ US$ C$ A$ ₽ ﷼ ₴ ₠ ₡ ₢ ₣ ₤ ₥ ₦ ₧ ₨ ₩ ₪ ₫ € ₭ ₮ ₯ ₰ ₱ ₲ ₳ ₴ ₵ ₶ ₷ ₸ ₹ ₺ ₻ ₼ ₽ ₾ ₿".split()
_UNITS = (
    "km km² km³ m m² m³ dm dm² dm³ cm cm² cm³ mm mm² mm³ ha µm nm yd in ft kg g mg µg t lb oz m/s km/h kmh mph hPa Pa "
    "mbar mb MB kb KB gb GB tb TB T G M K % км км² км³ м м² м³ дм дм² дм³ см см² см³ мм мм² мм³ нм кг г мг м/с км/ч "
    "кПа Па мбар Кб КБ кб Мб МБ мб Гб ГБ гб Тб ТБ тбكم كم² كم³ م م² م³ سم سم² سم³ مم مم² مم³ كم غرام جرام جم كغ ملغ "
    "كوب اكواب"
).split()
_HYPHENS = "- – — -- --- —— ~".split()

_DIGITS = frozenset(string.digits)
_LONGEST_EXCEPTION, _LONGEST_SUFFIX = 16, 12
_LONGEST_URL = 2048  # beyond, the search for a user's name takes its time

_EMOTICONS = r"""
:) :-) :)) :-)) :))) :-))) (: (-: =) (= :] :-] [: [-: [= =] :o) (o: :} :-} 8) 8-) (-8 ;) ;-) (; (-; :( :-( :(( :-((
:((( :-((( ): )-: =( >:( :') :'-) :'( :'-( :/ :-/ =/ =| :| :-| ]= =[ :1 :P :-P :p :-p :O :-O :o :-o :0 :-0 :() >:o :*
:-* :3 :-3 =3 :> :-> :X :-X :x :-x :D :-D ;D ;-D =D xD XD xDD XDD 8D 8-D ^_^ ^__^ ^___^ >.< >.> <.< ._. ;_; -_- -__-
v.v V.V v_v V_V o_o o_O O_o O_O 0_o o_0 0_0 o.O O.o O.O o.o 0.0 o.0 0.o @_@ <3 <33 <333 </3 (^_^) (-_-) (._.) (>_<)
(*_*) (¬_¬) ಠ_ಠ ಠ︵ಠ (ಠ_ಠ) ¯\(ツ)/¯ (╯°□°）╯︵┻━┻ ><(((*>
"""
_WHOLE = (
    r"""\t \n — ' \") <space> '' C++ ä. ö. ü. 'S 's ‘S ‘s and/or w/o 're 'Cause 'cause 'cos 'Cos 'coz 'Coz 'cuz 'Cuz """
    "'bout ma'am Ma'am o'clock O'clock lovin lovin' Lovin Lovin' havin havin' Havin Havin' doin doin' Doin Doin' goin "
    "goin' Goin Goin' nothin nothin' Nothin Nothin' nuthin nuthin' Nuthin Nuthin' ol ol' Ol Ol' somethin somethin' "
    "Somethin Somethin' em 'em ll 'll nuff 'nuff 'd a.m. p.m. e.g. E.g. E.G. i.e. I.e. I.E. v.s. vs. D.C. Ph.D. N.C. "
    "N.D. N.H. N.J. N.M. N.Y. S.C. Adm. Ak. Ala. Apr. Ariz. Ark. Aug. Bros. Calif. co. Co. Colo. Conn. Corp. Dec. Del. "
    "Dr. Feb. Fla. Ga. Gen. Gov. Ia. Id. Ill. Inc. Ind. Jan. Jr. Jul. Jun. Kan. Kans. Ky. La. Ltd. Mar. Mass. Md. "
    "Messrs. Mich. Minn. Miss. Mo. Mont. Mr. Mrs. Ms. Mt. Neb. Nebr. Nev. Nov. Oct. Okla. Ore. Pa. Prof. Rep. Rev. "
    "Sen. Sep. Sept. St. Tenn. Va. Wash. Wis."
).split()
_CUT = (
    "y'|all y|all how|'d|'y How|'d|'y not|'ve not|ve Not|'ve Not|ve can|not Can|not gon|na Gon|na got|ta Got|ta let|'s "
    "Let|'s c'm|on C'm|on °|c|. °|f|. °|k|. °|C|. °|F|. °|K|."
).split()
_NOT_CUT = "Ill ill Its its Hell hell Shell shell Shed shed were Were Well well Whore whore".split()


@functools.cache
def exceptions() -> dict[str, tuple[str, ...]]:
    """The pieces of every string that does not follow the rules."""
    cut: list[tuple[str, ...]] = [tuple(pieces.split("|")) for pieces in _CUT]

    def endings(words: str, *pieces: str) -> None:
        """Each word with each ending, whose pieces stand between bars, with and without apostrophes."""
        for word, ending in itertools.product(words.split(), pieces):
            for start, end in itertools.product((word, word.title()), (ending, ending.replace("'", ""))):
                cut.append((start, *end.split("|")))

    endings("i", "'m", "'m|a")
    endings("i you he she it we they", "'ll", "'ll|'ve", "'d", "'d|'ve")
    endings("i you we they", "'ve")
    endings("you we they", "'re")
    endings("he she it", "'s")
    endings("who what when where why how there that", "'s")
    endings("who what when where why how there that this these those", "'ll", "'ll|'ve", "'d", "'d|'ve")
    endings("this", "'s")
    endings("who what when where why how there these those", "'re", "'ve")
    endings("ca could do does did had may might must need ought sha should wo would", "n't", "n't|'ve")
    endings("could might must should would", "'ve")
    endings("ai are is was were have has dare", "n't")
    cut += [(str(hour), half) for hour in range(1, 13) for half in ("a.m.", "am", "p.m.", "pm")]
    found = {"".join(pieces): pieces for pieces in cut if "".join(pieces) not in _NOT_CUT}
    letters = [f"{chr(letter)}." for letter in range(ord("a"), ord("z") + 1)]
    found |= {whole: (whole,) for whole in (*_WHOLE, *_EMOTICONS.split(), *letters)}
    typographic = {
        whole.replace("'", "’"): tuple(piece.replace("'", "’") for piece in pieces) for whole, pieces in found.items()
    }
    return {**typographic, **found}


def _alphabet() -> dict[str, list[int]]:
    """Code points of the lower case, upper case and other letters, and of symbols such as emoji."""
    names = {"Ll": "lower", "Lu": "upper", "Lo": "uncased", "Lm": "uncased", "Lt": "uncased", "So": "icons"}
    points: dict[str, list[int]] = {name: [] for name in names.values()}
    for point in range(0x323B0):
        if name := names.get(unicodedata.category(chr(point))):
            points[name].append(point)
    return points


def _class(points: list[int]) -> str:
    """The inside of a regular expression's class with these characters."""
    edges: list[list[int]] = []
    for point in points:
        if edges and edges[-1][1] == point - 1:
            edges[-1][1] = point
        else:
            edges.append([point, point])
    return "".join(f"\\U{first:08x}-\\U{last:08x}" for first, last in edges)


def _infixes(lower: str, upper: str, uncased: str, icons: str) -> re.Pattern[str]:
    """Where the inside of a word is cut, for an alphabet; lookbehinds come last so that the search can skip."""
    quotes = re.escape(_QUOTES)
    letter = f"{lower}{upper}{uncased}"
    before, after = f"(?<=[{lower}{uncased}{quotes}].)", f"(?=[{upper}{uncased}{quotes}])"
    cuts = [
        r"\.\.+",
        "…",
        *([f"[{icons}]"] if icons else []),
        r"[+\-*^](?<=[0-9].)(?=[0-9-])",
        rf"\.{before}{after}",
        rf",(?<=[{letter}].)(?=[{letter}])",
        *(rf"{hyphen}(?<=[{letter}0-9]{'.' * len(hyphen)})(?=[{letter}])" for hyphen in _HYPHENS),
        rf"[:<>=/](?<=[{letter}0-9].)(?=[{letter}])",
    ]
    return re.compile("|".join(cuts))


class Rules:
    """The tokenizer."""

    def __init__(self):
        points = _alphabet()
        lower, upper, uncased, icons = (_class(points[name]) for name in ("lower", "upper", "uncased", "icons"))
        self._infixes = _infixes(lower, upper, uncased, icons)
        self._ascii_infixes = _infixes("a-z", "A-Z", "", "")
        self._may_cut = re.compile("[-.+*^,~:<>=/]").search
        self._url = _url(lower + uncased)
        ends = {*"".join(_PUNCTUATION), *_QUOTES, "—", "–", *map(chr, points["icons"])}
        self._suffixes = frozenset(ends)
        self._prefixes = frozenset({*ends, "§", "%", "=", *(name for name in _CURRENCIES if len(name) == 1)})
        self._long_prefixes = tuple(name for name in _CURRENCIES if len(name) > 1)
        units = sorted([*_CURRENCIES, *_UNITS], key=len, reverse=True)
        self._units = {last: tuple(unit for unit in units if unit[-1] == last) for last in {unit[-1] for unit in units}}
        self._before_stop = frozenset({*string.digits, *"%²-+|", *"".join(_PUNCTUATION), *_QUOTES})
        self._exceptions = exceptions()
        # What the rules cut although it is an exception is put together again afterwards.
        cut = {whole: self._affixes(whole, {}) for whole in self._exceptions}
        self._together = {tuple(pieces): whole for whole, pieces in cut.items() if len(pieces) > 1}
        self._longest = max(map(len, self._together))
        self._begin = frozenset(pieces[0] for pieces in self._together)

    def split(self, chunk: str) -> list[str]:
        """The words of a string without white space, whose concatenation it is."""
        if chunk in self._exceptions:
            return list(self._exceptions[chunk])
        return self._join(self._affixes(chunk, self._exceptions))

    def _affixes(self, text: str, exceptions: dict[str, tuple[str, ...]]) -> list[str]:
        before: list[str] = []
        after: list[str] = []
        start, end = 0, len(text)  # of what is left between prefixes and suffixes

        def is_exception(start: int, end: int) -> bool:
            return 0 < end - start <= _LONGEST_EXCEPTION and text[start:end] in exceptions

        while start < end and not is_exception(start, end):
            prefix = self._prefix(text, start, end)
            if prefix and is_exception(start + prefix, end):
                before.append(text[start : start + prefix])
                start += prefix
                break
            suffix = self._suffix(text, start + prefix, end)
            if suffix and is_exception(start, end - suffix):
                after.append(text[end - suffix : end])
                end -= suffix
                break
            if not prefix and not suffix:
                break
            if prefix:
                before.append(text[start : start + prefix])
            if suffix:
                after.append(text[end - suffix : end])
            start, end = start + prefix, end - suffix
        if is_exception(start, end):
            before += exceptions[text[start:end]]
        elif start < end:
            before += self._cut(text[start:end])
        return before + after[::-1]

    def _prefix(self, text: str, start: int, end: int) -> int:
        """Length of what is cut off at the start."""
        first = text[start]
        if first in self._prefixes:
            return 1
        if first == ".":
            dots = next((i for i in range(start, end) if text[i] != "."), end) - start
            return dots if dots > 1 else 0
        if first == "+":
            return 0 if text[start + 1 : start + 2] in _DIGITS else 1
        long = self._long_prefixes if first in "UCA" else ()
        return next((len(name) for name in long if text.startswith(name, start, end)), 0)

    def _suffix(self, text: str, start: int, end: int) -> int:
        """Length of what is cut off at the end, the longest where there are several."""
        tail = text[max(start, end - _LONGEST_SUFFIX) : end]
        last, previous = tail[-1:], tail[-2:-1]
        if last in self._units and last not in self._suffixes:
            for unit in self._units[last]:
                if tail.endswith(unit) and tail[-len(unit) - 1 : -len(unit)] in _DIGITS:
                    return len(unit)
        if last in self._suffixes:
            return 2 if tail.endswith("……") else 1
        if last == ".":
            dots = end - next((i + 1 for i in range(end - 1, start - 1, -1) if text[i] != "."), start)
            if dots > 1:
                return dots
            ends = (
                previous in self._before_stop or previous.islower() or (previous.isalpha() and not previous.isupper())
            )
            return 1 if ends or self._is_upper(tail[-3:-1]) or (tail[-3:-2] == "°" and previous in "FfCcKk") else 0
        if last == "+":
            return 1 if previous in _DIGITS else 0
        return 2 if last in ("s", "S") and previous in ("'", "’") else 0

    def _is_upper(self, pair: str) -> bool:
        return len(pair) == 2 and all(letter.isalpha() and not letter.islower() for letter in pair)

    def _cut(self, text: str) -> list[str]:
        ascii_only = text.isascii()
        if text.isalnum() or (ascii_only and not self._may_cut(text)):
            return [text]
        if "." in text and len(text) <= _LONGEST_URL and self._url(text):
            return [text]
        pieces, position = [], 0
        for found in (self._ascii_infixes if ascii_only else self._infixes).finditer(text):
            if found.start() == 0:
                continue
            pieces += [text[position : found.start()], found.group()]
            position = found.end()
        return [piece for piece in (*pieces, text[position:]) if piece] if pieces else [text]

    def _join(self, pieces: list[str]) -> list[str]:
        """Replaces runs of pieces that are an exception by its own, the longest first, of these the first."""
        if len(pieces) < 2 or self._begin.isdisjoint(pieces):
            return pieces
        runs = [
            (size, start)
            for start in range(len(pieces))
            for size in range(2, min(self._longest, len(pieces) - start) + 1)
            if tuple(pieces[start : start + size]) in self._together
        ]
        taken: set[int] = set()
        chosen: dict[int, int] = {}
        for size, start in sorted(runs, key=lambda run: (-run[0], run[1])):
            if start not in taken and start + size - 1 not in taken:
                chosen[start] = size
            taken.update(range(start, start + size))
        joined, position = [], 0
        while position < len(pieces):
            size = chosen.get(position, 0)
            if size:
                joined += self._exceptions[self._together[tuple(pieces[position : position + size])]]
            else:
                joined.append(pieces[position])
            position += size or 1
        return joined


def _url(lower: str):
    """Matches addresses (after Diego Perini's expression): scheme, user, IPv4 or host and domain, port, path."""
    word = r"A-Za-z0-9\u00a1-\uffff"
    octets = r"(?:[1-9]\d?|1\d\d|2[01]\d|22[0-3])(?:\.(?:1?\d{1,2}|2[0-4]\d|25[0-5])){2}"
    private = (
        r"(?!(?:10|127)(?:\.\d{1,3}){3})(?!(?:169\.254|192\.168)(?:\.\d{1,3}){2})"
        r"(?!172\.(?:1[6-9]|2\d|3[0-1])(?:\.\d{1,3}){2})"
    )
    return re.compile(
        r"(?:(?:[\w\+\-\.]{2,})://)?(?:\S+(?::\S*)?@)?"
        rf"(?:{private}{octets}(?:\.(?:[1-9]\d?|1\d\d|2[0-4]\d|25[0-4]))"
        rf"|(?:(?:[{word}][{word}_-]{{0,62}})?[{word}]\.)+(?:[{lower}]{{2,63}}))"
        r"(?::\d{2,5})?(?:[/?#]\S*)?$"
    ).match
