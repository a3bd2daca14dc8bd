"""Messages with orders in them, and what is ordered as JSON: a task as people have them, with answers that are known.

The held-out messages are worded as no training message is, and their names, goods and towns occur in none.
"""

import json
import random
from pathlib import Path

INSTRUCTION = (
    "Read the message and write the order as JSON with the keys name, item, quantity, city and day. "
    "The quantity is a number.\n\nMessage: "
)
DAYS = ["Monday", "Tuesday", "Wednesday", "Thursday", "Friday", "Saturday", "Sunday"]
NUMBERS = "two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen sixteen"
FIRST = "Maria James Aisha Chen Olga Peter Fatima Luis Hannah Kofi Emma Ravi Sofia Jonas Mei Carlos Nadia Tom Ines Paul"
LAST = "Lopez Smith Khan Wei Petrova Jones Haddad Garcia Meyer Mensah Brown Patel Rossi Berg Tanaka Silva Novak Clark"
ITEMS = (
    "blue pens,desk lamps,paper towels,garden chairs,coffee mugs,wool blankets,phone cases,water bottles,floor tiles,"
    "light bulbs,cotton shirts,kitchen knives,picture frames,rubber gloves,storage boxes,candles,notebooks,door locks"
)
CITIES = "Leeds Porto Lyon Hamburg Denver Turin Bristol Seville Oslo Boston Ghent Malmo Krakow Dallas Geneva Bergen"
MESSAGES = [
    "Hi, could you send {n} {item} to our shop in {city} by {day}? Thanks, {name}",
    "{name} here. We need {n} {item} in {city} on {day}, please.",
    "Please put down an order of {n} {item} for {name}, delivery to {city}, {day} at the latest.",
    "Hello! My name is {name} and I would like to buy {n} {item}. I live in {city}. {day} would be perfect.",
    "We are out of {item} again! {n} of them to {city}, and no later than {day}. Regards, {name}",
    "On {day} a van goes to {city}. Can it take {n} {item} for {name}?",
    "Order from {name}: {item}, {n} pieces. Ship to {city}. Date: {day}.",
    "Dear team, for the new office in {city} I want {n} {item}. Is {day} possible? Best, {name}",
    "{n} {item} please, for {day}. Address is the usual one in {city}. {name}",
    "This is {name} from {city}. Would you deliver {n} {item} to us this {day}?",
    "It is urgent: by {day} there must be {n} {item} in {city}. I am {name}, you know me.",
    "I was told to ask you for {item}. So: {n}, to {city}, {day}. Yours, {name}",
]
HELD = {
    "first": "Lena Omar Grace Viktor Yuki Diego Amara Felix",
    "last": "Fischer Okafor Martin Sato Moreau Ivanov Reyes Lind",
    "items": "steel bolts,tea cups,beach towels,bicycle tyres,wall clocks,leather belts,plant pots,board games",
    "cities": "Vienna Dublin Austin Nantes Bologna Tampere Utrecht Zagreb",
    "messages": [
        "Good morning, {name} speaking. Our store in {city} has sold all of the {item}: bring us {n} on {day}.",
        "Quick note from {city}: {name} asks whether {n} {item} can be here for {day}.",
        "If you have {item} in stock, reserve {n} for {name}. Pick-up is {day}, at the {city} branch.",
        "You promised {n} {item}. It is nearly {day} and {city} has seen none of them. {name}",
    ],
}
ASKED = {
    "first": "Marta Bilal Greta Tariq Hana Mateo Zola Oscar",
    "last": "Keller Adeyemi Dubois Kimura Laurent Sokolov Vargas Holm",
    "items": "copper pipes,soup bowls,bed sheets,bicycle bells,alarm clocks,suede gloves,seed trays,jigsaw puzzles",
    "cities": "Prague Cork Houston Rennes Modena Turku Breda Rijeka",
    "messages": [
        "Greetings from {city}! {name} would be glad of {n} {item} before {day}.",
        "{city}, {day}: that is where and when {n} {item} are wanted, says {name}.",
        "Nobody in {city} can find {item} any more. Could {name} get {n} on {day}?",
        "For {name}: {n} {item}. The lorry leaves for {city} on {day}.",
        "A call came from {city}. It was {name}, who wants {n} {item} for {day}.",
        "We spoke last week about {item}. Make it {n}, on {day}, to our {city} office. {name}",
    ],
}
"""For what a model is asked after the first training: worded as neither."""


def rows(count: int, seed: int, words: dict | None = None) -> list[dict]:
    """Return chats of one question and its answer."""
    draw, words, numbers = random.Random(seed), words or {}, NUMBERS.split()
    first, last = words.get("first", FIRST).split(), words.get("last", LAST).split()
    items, cities = words.get("items", ITEMS).split(","), words.get("cities", CITIES).split()
    made = []
    for _ in range(count):
        n = draw.randint(2, 60)
        said = numbers[n - 2] if n - 2 < len(numbers) and draw.random() < 0.7 else str(n)
        order = {
            "name": f"{draw.choice(first)} {draw.choice(last)}", "item": draw.choice(items), "quantity": n,
            "city": draw.choice(cities), "day": draw.choice(DAYS),
        }  # fmt: skip
        text = draw.choice(words.get("messages", MESSAGES)).format(**{**order, "n": said})
        text = text[0].upper() + text[1:]
        made.append({"messages": [
            {"role": "user", "content": INSTRUCTION + text}, {"role": "assistant", "content": json.dumps(order)},
        ]})  # fmt: skip
    return made


def write(folder: Path, train: int = 200, held_out: int = 200, more: int = 600, asked: int = 200) -> None:
    """Write train, held and more.jsonl, which are chats, and asked.jsonl, prompts with their answers, into a folder."""
    folder.mkdir(parents=True, exist_ok=True)
    chats = {"train": rows(train, 1), "held": rows(held_out, 2, HELD), "more": rows(more, 3)}
    pairs = [[message["content"] for message in row["messages"]] for row in rows(asked, 4, ASKED)]
    prompts = [{"prompt": prompt, "answer": answer} for prompt, answer in pairs]
    for name, made in {**chats, "asked": prompts}.items():
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in made), encoding="utf-8")


if __name__ == "__main__":
    write(Path("runs/real"))
