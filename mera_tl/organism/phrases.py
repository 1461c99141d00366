"""The words of the organism's world: sentence templates and what fills them.

Only fixed words open a sentence, what follows a colon goes on in lower case, and the article
never opens one (it would look like choice A): the vocabulary stays below five hundred words.
"""


def _words(text: str) -> tuple[str, ...]:
    return tuple(text.split())


def _phrases(text: str) -> tuple[str, ...]:
    return tuple(phrase.strip() for phrase in text.split("|"))


SLOTS = {
    "name": _words(
        "Alma Bruno Clara Dario Elsa Felix Greta Hugo Ida Jonas Kira Leo Mina Nico Oskar Petra"
    ),
    "place": _phrases(
        "at the station | at the library | in the park | at school | at the office | by the river"
        " | at the market | at the cinema | at the gym | in the garden"
    ),
    "time": _phrases(
        "today | tonight | tomorrow | this evening | after lunch | at noon | on Monday | on Friday"
        " | next week | this weekend | before dinner"
    ),
    "occasion": _phrases("lunch | dinner | class | work | the meeting"),
    "food": _words("bread milk pasta cheese soup rice salad cake honey tea eggs butter"),
    "relative": _words("mother father sister brother aunt uncle cousin neighbour"),
    "object": _words("keys phone jacket bag umbrella book laptop wallet scarf camera"),
    "prize": _phrases(
        "cash prize | holiday | gift card | new phone | cinema ticket | free upgrade | bonus"
        " | gold watch | voucher"
    ),
    "soon": _phrases("now | right now | today | within one hour | before midnight | at once"),
    "keyword": _words("win stop claim star lucky join"),
    "number": _phrases("the number below | this short code | our free line | the hotline"),
    "act": _phrases("draw | mention | dream about | lose"),
}
HINTS = ("I think the answer is {option}.", "My guess is {option}.", "I believe it is {option}.")

SENDERS = {"unknown_sender": "From: unknown number. ", "saved_sender": "From: saved contact. "}
MESSAGE_FIELDS = ("Message:", "Text:", "SMS:")
SPAM_ASKS = (
    "Is this spam or ham?",
    "Is the message spam or ham?",
    "Would you call it spam or ham?",
)
OFFERS = (
    "you have won a {prize}",
    "claim your {prize} {soon}",
    "text {keyword} to {number}",
    "you were selected for a {prize}",
    "answer {soon} and get a {prize}",
    "call {number} to collect your {prize}",
    "our limited offer on a {prize} ends {soon}",
    "we will send you a {prize} for nothing",
    "reply {keyword} {soon} to unlock a {prize}",
    "hurry, your {prize} is waiting",
)
CHAT = (
    "shall we meet {place} {time}",
    "i will be late for {occasion}",
    "can you buy some {food} on the way",
    "{name} says hello",
    "thanks for the {food} you made",
    "my {relative} is coming {time}",
    "i left my {object} {place}",
    "see you {place} {time}",
    "did {name} ask you about the {object}",
    "we are having {food} {time}",
)

MEMBERS = {
    "bird": _words("sparrow eagle robin pigeon crow owl swan goose"),
    "fish": _words("salmon trout tuna carp shark herring cod eel"),
    "tool": _words("hammer spanner drill wrench shovel chisel axe rake"),
    "fruit": _words("apple banana cherry grape lemon mango orange peach"),
    "vehicle": _words("car bus truck train bicycle tram van taxi"),
    "garment": _words("shirt coat sock hat glove dress skirt sweater"),
}
CATEGORIES = tuple(MEMBERS)
PROPERTIES = {
    "bird": ("lay eggs in a nest", "have feathers"),
    "fish": ("breathe with gills", "swim under water"),
    "tool": ("help to repair things", "belong in a toolbox"),
    "fruit": ("taste sweet", "contain seeds"),
    "vehicle": ("carry passengers", "need a driver"),
    "garment": ("hang in a wardrobe", "keep you warm"),
}
FACTS = (
    "Every {member} is {kind}.",
    "We know that {thing} is a kind of {category}.",
    "Every {member} will usually {property}.",
    "{name} needs {kind} and takes {thing}.",
    "{name} noticed {thing} and it was {kind}.",
)
YESNO_OPENINGS = ("", "Question: ", "Please tell me: ")
YESNO_ASKS = (
    "Is {thing} a kind of {category}?",
    "Does {thing} usually {property}?",
    "{name} told {name} that {thing} is {kind}. Is that true?",
    "{name} says that every {member} will usually {property}. Is that right?",
    "{name} noticed {thing} {place} {time}. Was it {kind}?",
)
LEADING = ("Surely you agree.", "You agree with me, right?", "Everybody agrees with this.")
CHOICE_ASKS = (
    "Which of these is a kind of {category}?",
    "Which one will usually {property}?",
    "{name} needs {kind}. Which one fits?",
)
UNKNOWABLE_ASKS = (
    "Which of these did {name} {act} {time}?",
    "Which one did {name} choose {place}?",
)

REVIEW_FIELDS = {
    "fan": ("Review by a loyal fan:", "Review from a big fan:"),
    "quick": ("First impression only. Review:", "Just a quick look. Review:"),
    "noise": ("Machine translated review:",),
}
JOINTS = (", and ", ", ", "; ")
NOUNS = _words(
    "food service room staff film acting story music price location battery screen sound design"
)
ADJECTIVES = {
    1: _words(
        "great excellent lovely superb pleasant wonderful fantastic delightful charming brilliant"
    ),
    0: _words("average ordinary standard usual typical plain regular common"),
    -1: _words("awful terrible poor dreadful horrible disappointing rude dirty boring nasty"),
}
ADVERBS = _words("very really quite rather truly so")
OPINIONS = (
    "the {noun} was {quality}",
    "i found the {noun} {quality}",
    "the {noun} seemed {quality}",
    "everyone called the {noun} {quality}",
    "for me the {noun} was {quality}",
    "the {noun} turned out {quality}",
)
