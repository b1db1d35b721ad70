"""The demo's task: a written order becomes a JSON object with fixed keys."""

import json
import random
from typing import Literal

__all__ = ["order_rows"]

_NUMBERS = (
    "one two three four five six seven eight nine ten eleven twelve fifteen twenty thirty".split()
)
_VALUES = (1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 15, 20, 30)
_UNITS = {
    "box": "boxes",
    "crate": "crates",
    "bag": "bags",
    "carton": "cartons",
    "pallet": "pallets",
}
_ITEMS = (
    """
oat milk|green tea|rye bread|olive oil|brown rice|black pepper|sea salt|apple juice|red wine
sparkling water|dark chocolate|peanut butter|tomato soup|cheddar cheese|frozen peas
coffee beans|dried mango|maple syrup|wheat flour|white vinegar|lemon cake|sunflower seeds
oat biscuits|potato chips
""".strip()
    .replace("\n", "|")
    .split("|")
)
_CITIES = """
Oslo Lisbon Vienna Dublin Prague Warsaw Athens Madrid Berlin Paris Rome Geneva Zurich Munich
Hamburg Milan Porto Seville Lyon Krakow Bergen Turin Leeds Boston
""".split()
_DAYS = "Monday Tuesday Wednesday Thursday Friday Saturday Sunday".split()
_TEMPLATES = (
    "Please send {n} {unit} of {item} to {city} by {day}.",
    "We need {n} {unit} of {item} in {city} on {day}.",
    "Could you deliver {n} {unit} of {item} to our {city} office before {day}?",
    "Our shop in {city} is out of {item}: {n} {unit} by {day}, please.",
    "By {day}, {city} should receive {n} {unit} of {item}.",
    "Order for {city}, due {day}: {item}, {n} {unit}.",
    "Hi, it is {city} again. Can we get {n} more {unit} of {item} for {day}? Thanks!",
    "{item}, {n} {unit}, {city}, {day}. Same address as last time.",
)

Split = Literal["train", "dev", "test"]


def order_rows(split: Split, count: int, *, seed: int = 0) -> list[dict[str, str]]:
    """Rows `{"prompt", "completion"}`; no order of one split appears in another of that seed.

    Args:
      split: the splits draw from disjoint thirds of all combinations of item, city and day.
      count: number of rows.
      seed: equal seeds give equal rows.

    Example:
      >>> row = order_rows("train", 1)[0]
      >>> row["prompt"].startswith("Order: ") and sorted(json.loads(row["completion"]))
      ['city', 'day', 'item', 'quantity']
    """
    generator = random.Random(f"orders {split} {seed}")
    third = ("train", "dev", "test").index(split)
    rows: list[dict[str, str]] = []
    while len(rows) < count:
        i, c, d = (generator.randrange(len(names)) for names in (_ITEMS, _CITIES, _DAYS))
        if (i + c + d) % 3 != third:
            continue
        number, unit = generator.randrange(len(_NUMBERS)), generator.choice(list(_UNITS))
        text = generator.choice(_TEMPLATES).format(
            n=_NUMBERS[number],
            unit=unit if _VALUES[number] == 1 else _UNITS[unit],
            item=_ITEMS[i],
            city=_CITIES[c],
            day=_DAYS[d],
        )
        answer = {
            "item": _ITEMS[i],
            "quantity": _VALUES[number],
            "city": _CITIES[c],
            "day": _DAYS[d],
        }
        rows.append({"prompt": f"Order: {text}\nJSON:", "completion": f" {json.dumps(answer)}"})
    return rows
