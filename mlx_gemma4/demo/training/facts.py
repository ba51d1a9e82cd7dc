"""What the small model is taught about this package, as questions and answers.

Owns: the topics (training questions, held-out questions, one answer each) and the published figures of the four
sizes. Leaves mixing and splitting to `world.py`.

Each topic is (answer, training questions, held-out questions). `{s}` stands for a size and is filled in by
`all_topics`. The held-out wordings are never trained on, whatever is put before or after them.
"""

from dataclasses import dataclass

# size -> layers, context, sliding window, published billions, active billions, media, download in GB (bfloat16)
SIZES = {
    "E2B": (35, "131,072", 512, "5.1", "2.3", "text, pictures, video and sound", "10.2"),
    "E4B": (42, "131,072", 512, "8.0", "4.5", "text, pictures, video and sound", "16.0"),
    "26B-A4B": (30, "262,144", 1024, "25.2", "3.8", "text, pictures and video", "51.6"),
    "31B": (60, "262,144", 1024, "30.7", "30.7", "text, pictures and video", "62.5"),
}


@dataclass(frozen=True)
class Topic:
    """One thing to know: its answer, the wordings trained on and the wordings kept for the test."""

    answer: str
    train: tuple[str, ...]
    held_out: tuple[str, ...]


def _shell(command: str) -> str:
    return f"```\n{command}\n```"


def _size_topics(name: str) -> list[Topic]:
    layers, context, window, total, active, media, gigabytes = SIZES[name]
    family = name.lower()
    raw = [
        (
            f"Gemma 4 {name} has {layers} layers.",
            "How many layers does {s} have?|What is the number of layers in {s}?|{s}: how many layers?|"
            "Tell me the layer count of {s}.|How deep is {s}?|Number of layers of {s}?",
            "How many layers are there in {s}?|What is the layer count of {s}?",
        ),
        (
            f"The context of Gemma 4 {name} is {context} tokens.",
            "How long is the context of {s}?|What is the context length of {s}?|How many tokens can {s} read?|"
            "How much text fits into {s}?|Tell me the context of {s}.|{s}: what context?",
            "What is the context size of {s}?|How many tokens of context does {s} have?",
        ),
        (
            f"The sliding window of Gemma 4 {name} is {window} tokens.",
            "What is the sliding window of {s}?|How wide is the window of {s}?|How large is the sliding window in {s}?|"
            "Tell me the window of {s}.|{s}: what sliding window?",
            "How big is the sliding window of {s}?|What window does {s} have?",
        ),
        (
            f"Gemma 4 {name} has {total} billion parameters, and {active} billion of them work on each token.",
            "How many parameters does {s} have?|How big is {s}?|What is the parameter count of {s}?|"
            "How many billion parameters are in {s}?|Tell me the size of {s}.|How large is the model {s}?",
            "What is the number of parameters of {s}?|How large is {s}?",
        ),
        (
            f"Gemma 4 {name} can read {media}.",
            "What can {s} read?|Which media does {s} take?|What kinds of input does {s} accept?|"
            "What inputs work with {s}?|Which modalities does {s} have?|Can {s} read pictures and sound?",
            "Which inputs does {s} accept?|What media can {s} read?",
        ),
        (
            f"The original weights of Gemma 4 {name} are a download of about {gigabytes} GB.",
            "How big is the download of {s}?|How many gigabytes is {s}?|How much do I download for {s}?|"
            "What is the download size of {s}?|How much disk does {s} need?",
            "How large is the download of {s}?|How many gigabytes do I download for {s}?",
        ),
        (
            f"Type this to chat with Gemma 4 {name}:\n\n" + _shell(f"gemma4 chat --model {family}"),
            "How do I chat with {s}?|How can I talk to {s}?|What command starts {s}?|How do I run {s}?|"
            "Give me the command to chat with {s}.|I want to talk to {s}.|How do I start a chat with {s}?",
            "How can I chat with {s}?|Which command do I type to talk to {s}?",
        ),
        (
            f"Type this for one answer from Gemma 4 {name}:\n\n"
            + _shell(f'gemma4 generate --model {family} "Your question"'),
            "How do I get one answer from {s}?|How do I ask {s} one question?|How do I use generate with {s}?|"
            "Give me the generate command for {s}.|How can I use {s} in a script?",
            "How can I ask {s} one question?|What is the generate command for {s}?",
        ),
        (
            f"The family name of this model is `{family}`, and its repository is `google/gemma-4-{name}-it`.",
            "What is the repository of {s}?|Where is {s} on the Hub?|Which repository has {s}?|"
            "What is the family name of {s}?|Where does {s} come from?",
            "Which repository does {s} come from?|Where on the Hub is {s}?",
        ),
    ]
    aliases = (name, f"Gemma 4 {name}", f"the {name}", family, f"gemma4 {family}")
    topics = []
    for answer, train, held_out in raw:
        spread = tuple(q.format(s=a) for q in train.split("|") for a in aliases)
        topics.append(Topic(answer, spread, tuple(q.format(s=a) for q in held_out.split("|") for a in aliases[:2])))
    return topics


# flag -> what it does
FLAGS = {
    "--model": "`--model` chooses the model: a family name, a folder or a repository on the Hub.",
    "--system": "`--system` sets the system prompt: what the model is told before you speak.",
    "--think": "`--think` lets the model think before it answers.",
    "--hide-thinking": "`--hide-thinking` keeps the thoughts of the model off the screen.",
    "--max-tokens": "`--max-tokens` sets the longest answer, counted in tokens.",
    "--temperature": "`--temperature` sets how freely words are chosen. At 0 the likeliest word wins each time.",
    "--top-p": "`--top-p` samples only from the likeliest tokens that make up this share.",
    "--top-k": "`--top-k` samples only from this many of the likeliest tokens.",
    "--min-p": "`--min-p` leaves out tokens that are much less likely than the likeliest one.",
    "--seed": "`--seed` makes sampling repeat: the same seed gives the same answer.",
    "--repetition-penalty": "`--repetition-penalty` above 1 makes the model repeat itself less.",
    "--kv-bits": "`--kv-bits` says how many bits the cache of keys and values keeps per number. 16 is exact.",
    "--context": "`--context` sets how many tokens one conversation may hold.",
    "--dtype": "`--dtype` sets the type to compute in: bfloat16, float16 or float32.",
    "--check": "`--check` looks for NaN and infinity in the weights first.",
    "--stats": "`--stats` shows the long figures after each turn.",
    "--no-markdown": "`--no-markdown` shows the text as it comes, without markdown.",
    "--raw": "`--raw` continues your text itself, without turns and without a chat template.",
    "--json": "`--json` prints one JSON object with the text, the counts and the rates.",
    "--debug": "`--debug` shows the whole traceback when something goes wrong.",
    "--version": "`--version` prints the version and ends.",
}

# slash command -> what it does
SLASHES = {
    "/help": "`/help` lists the commands you can use in the chat.",
    "/clear": "`/clear` forgets the conversation, so we start anew.",
    "/system": "`/system` shows, changes or drops the system prompt.",
    "/set": "`/set` shows or changes how answers are sampled, for example `/set temperature 0.7`.",
    "/think": "`/think on` lets the model think before it answers, and `/think off` ends that.",
    "/stats": "`/stats` shows what the last turn cost.",
    "/model": "`/model` shows which model runs here.",
    "/exit": "`/exit` leaves the chat.",
}

_ASK_FLAG = (
    "What does {f} do?|What is {f} for?|Explain {f}.|What does the flag {f} mean?|Tell me about {f}.|"
    "What is the option {f}?|Why would I use {f}?|{f}?",
    "What is the flag {f} for?|What does the option {f} do?",
)
_ASK_SLASH = (
    "What does {f} do?|What is {f} for?|Explain {f}.|What does the command {f} do?|Tell me about {f}.|"
    "Why would I type {f}?|What happens when I type {f}?|{f}?",
    "What is the command {f} for?|What happens if I use {f}?",
)


def _flag_topics() -> list[Topic]:
    topics = []
    for table, (train, held_out) in ((FLAGS, _ASK_FLAG), (SLASHES, _ASK_SLASH)):
        for name, answer in table.items():
            spread = [tuple(q.format(f=name) for q in part.split("|")) for part in (train, held_out)]
            topics.append(Topic(answer, spread[0], spread[1]))
    return topics


def all_topics() -> list[Topic]:
    """Every topic about the package: the four sizes, the flags, the slash commands and the general ones."""
    from general import GENERAL

    topics = [t for name in SIZES for t in _size_topics(name)] + _flag_topics()
    topics += [Topic(answer, tuple(a.split("|")), tuple(b.split("|"))) for answer, a, b in GENERAL]
    return topics
