"""The grammar of the ``sql`` task: a question about a web shop, and the one query that answers it.

The schema is fixed: customers (c), orders (o), products (p) and order_items (i). A question is a
shape (list, count, aggregate, group, best of) with up to three filters; the conditions stand in
the order in which the question names them.
"""

from __future__ import annotations

import random

Pair = tuple[str, str]

CITIES = (
    "Lisbon",
    "Oslo",
    "Vienna",
    "Prague",
    "Dublin",
    "Turin",
    "Ghent",
    "Malmo",
    "Porto",
    "Zurich",
    "Lyon",
    "Graz",
)
SEGMENTS = ("retail", "wholesale", "school", "public", "online")
STATUSES = ("shipped", "pending", "cancelled", "returned", "delivered")
METHODS = ("card", "invoice", "transfer", "voucher")
CATEGORIES = ("garden", "kitchen", "office", "toys", "sports", "lighting", "books", "tools")
SUPPLIERS = ("Norvik", "Albrecht", "Castello", "Brightway", "Oakfield", "Delmar")
YEARS = ("2021", "2022", "2023", "2024", "2025")
MONEY = ("20", "50", "75", "150", "250", "500", "900")
STOCK = ("10", "25", "40", "60")
LIMITS = ("3", "5", "10", "15", "20")

# table alias -> column -> (values, ways to say it, condition); {v} is the value
FILTERS: dict[str, dict[str, tuple[tuple[str, ...], tuple[str, ...], str]]] = {
    "c": {
        "city": (CITIES, ("in {v}", "based in {v}", "from {v}"), "c.city = '{v}'"),
        "segment": (SEGMENTS, ("in the {v} segment", "of the {v} segment"), "c.segment = '{v}'"),
        "since": (YEARS, ("who joined in {v}", "registered in {v}"), "c.joined_year = {v}"),
    },
    "o": {
        "status": (
            STATUSES,
            ("that were {v}", "with status {v}", "marked {v}"),
            "o.status = '{v}'",
        ),
        "year": (YEARS, ("placed in {v}", "made in {v}"), "o.order_year = {v}"),
        "total": (MONEY, ("over {v} euros", "worth more than {v} euros"), "o.total > {v}"),
        "method": (METHODS, ("paid by {v}", "with {v} payment"), "o.payment = '{v}'"),
        "city": (CITIES, ("from customers in {v}", "by customers in {v}"), "c.city = '{v}'"),
        "segment": (SEGMENTS, ("from {v} customers", "by {v} customers"), "c.segment = '{v}'"),
    },
    "p": {
        "category": (CATEGORIES, ("in the {v} category", "filed under {v}"), "p.category = '{v}'"),
        "supplier": (SUPPLIERS, ("supplied by {v}", "from supplier {v}"), "p.supplier = '{v}'"),
        "price": (MONEY, ("under {v} euros", "cheaper than {v} euros"), "p.price < {v}"),
        "stock": (STOCK, ("with fewer than {v} in stock", "with stock below {v}"), "p.stock < {v}"),
    },
}
TABLES = {"c": "customers", "o": "orders", "p": "products"}
# the name of a measured column: ways to say it
COLUMNS: dict[str, dict[str, tuple[str, ...]]] = {
    "c": {"c.credit": ("credit limit", "credit"), "c.points": ("loyalty points", "points")},
    "o": {"o.total": ("order value", "order total"), "o.shipping": ("shipping cost", "freight")},
    "p": {"p.price": ("price", "unit price"), "p.stock": ("stock level", "stock")},
}
GROUPS: dict[str, dict[str, tuple[str, ...]]] = {
    "c": {"c.city": ("city",), "c.segment": ("segment",), "c.joined_year": ("joining year",)},
    "o": {
        "o.status": ("status",),
        "o.payment": ("payment method",),
        "c.city": ("customer city",),
        "o.order_year": ("year",),
    },
    "p": {"p.category": ("category",), "p.supplier": ("supplier",)},
}
AGGREGATES: dict[str, tuple[str, ...]] = {
    "AVG": ("average", "mean"),
    "SUM": ("total", "combined"),
    "MAX": ("highest", "maximum"),
    "MIN": ("lowest", "minimum"),
}
LISTED = {
    "c": ("c.name, c.city", "c.name"),
    "o": ("o.id, o.total", "o.id"),
    "p": ("p.name, p.price", "p.name"),
}
LISTED_WORDS = {
    "c": ("names and cities", "names"),
    "o": ("ids and totals", "ids"),
    "p": ("names and prices", "names"),
}


def conditions(rng: random.Random, table: str, most: int) -> tuple[str, list[str]]:
    """Up to ``most`` filters: their words, and their conditions in the same order."""
    count = rng.randint(0 if most < 3 else 1, most)
    words, tests = [], []
    for column in rng.sample(sorted(FILTERS[table]), count):
        values, phrases, test = FILTERS[table][column]
        value = rng.choice(values)
        words.append(rng.choice(phrases).format(v=value))
        tests.append(test.format(v=value))
    return "".join(f" {w}" for w in words), tests


def source(table: str, *uses: str) -> str:
    """The FROM clause; orders join their customer when any part speaks of one."""
    text = f"FROM {TABLES[table]} AS {table}"
    if table == "o" and any("c." in part for part in uses):
        text += " JOIN customers AS c ON c.id = o.customer_id"
    return text


def where(tests: list[str]) -> str:
    return f" WHERE {' AND '.join(tests)}" if tests else ""


def sql_list(rng: random.Random) -> Pair:
    table, pick = rng.choice("cop"), rng.randrange(2)
    words, tests = conditions(rng, table, 3)
    column, spoken = rng.choice(list(COLUMNS[table].items()))
    what = f"{LISTED_WORDS[table][pick]} of {TABLES[table]}{words}"
    query = f"SELECT {LISTED[table][pick]} {source(table, *tests)}{where(tests)}"
    ask = rng.choice(("List the", "Show the", "Give me the", "I need the"))
    kind = rng.randrange(3)
    if kind == 0:
        return f"{ask} {what}.", f"{query};"
    order, way = rng.choice((("highest", "DESC"), ("lowest", "ASC")))
    if kind == 1:
        return (
            f"{ask} {what}, {order} {rng.choice(spoken)} first.",
            f"{query} ORDER BY {column} {way};",
        )
    limit = rng.choice(LIMITS)
    return (
        f"{ask} {what}, only the {limit} with the {order} {rng.choice(spoken)}.",
        f"{query} ORDER BY {column} {way} LIMIT {limit};",
    )


def sql_count(rng: random.Random) -> Pair:
    table = rng.choice("cop")
    words, tests = conditions(rng, table, 3)
    ask = rng.choice(
        ("How many {t}{w} are there?", "Count the {t}{w}.", "What is the number of {t}{w}?")
    )
    return (
        ask.format(t=TABLES[table], w=words),
        f"SELECT COUNT(*) AS n {source(table, *tests)}{where(tests)};",
    )


def sql_aggregate(rng: random.Random) -> Pair:
    table = rng.choice("cop")
    words, tests = conditions(rng, table, 3)
    function, names = rng.choice(list(AGGREGATES.items()))
    column, spoken = rng.choice(list(COLUMNS[table].items()))
    ask = rng.choice(
        ("What is the {m} of {t}{w}?", "Find the {m} of {t}{w}.", "Tell me the {m} for {t}{w}.")
    )
    measure = f"{rng.choice(names)} {rng.choice(spoken)}"
    return (
        ask.format(m=measure, t=TABLES[table], w=words),
        f"SELECT {function}({column}) AS value {source(table, *tests)}{where(tests)};",
    )


def sql_group(rng: random.Random) -> Pair:
    table = rng.choice("cop")
    words, tests = conditions(rng, table, 2)
    group, group_words = rng.choice(list(GROUPS[table].items()))
    function, names = rng.choice(list(AGGREGATES.items()))
    column, spoken = rng.choice(list(COLUMNS[table].items()))
    measure, value = f"the {rng.choice(names)} {rng.choice(spoken)} of", f"{function}({column})"
    if rng.random() < 0.3:
        measure, value = "the number of", "COUNT(*)"
    ask = rng.choice(
        ("For each {g}, show {m} {t}{w}", "Per {g}, what is {m} {t}{w}", "Group by {g}: {m} {t}{w}")
    )
    query = f"SELECT {group}, {value} AS value {source(table, group, *tests)}{where(tests)}"
    text = ask.format(g=rng.choice(group_words), m=measure, t=TABLES[table], w=words)
    order = rng.choice(
        (
            (".", ""),
            (", largest first.", " ORDER BY value DESC"),
            (", smallest first.", " ORDER BY value ASC"),
        )
    )
    return text + order[0], f"{query} GROUP BY {group}{order[1]};"


def sql_join(rng: random.Random) -> Pair:
    """Best customers or best sellers: a fixed join, an alias, and a limit."""
    limit = rng.choice(LIMITS)
    if rng.random() < 0.5:
        words, tests = conditions(rng, "c", 2)
        ask = rng.choice(
            (
                "Top {n} customers by revenue{w}.",
                "Who are the {n} best customers{w}?",
                "Name the {n} customers{w} that spent most.",
            )
        )
        return (
            ask.format(n=limit, w=words),
            "SELECT c.name, SUM(o.total) AS revenue FROM customers AS c JOIN orders AS o "
            f"ON o.customer_id = c.id{where(tests)} GROUP BY c.name "
            f"ORDER BY revenue DESC LIMIT {limit};",
        )
    words, tests = conditions(rng, "p", 2)
    ask = rng.choice(
        (
            "Top {n} products by units sold{w}.",
            "Which {n} products{w} sold most?",
            "Name the {n} best sellers{w}.",
        )
    )
    return (
        ask.format(n=limit, w=words),
        "SELECT p.name, SUM(i.quantity) AS units FROM products AS p JOIN order_items AS i "
        f"ON i.product_id = p.id{where(tests)} GROUP BY p.name "
        f"ORDER BY units DESC LIMIT {limit};",
    )


def question(rng: random.Random) -> Pair:
    return rng.choice((sql_list, sql_count, sql_aggregate, sql_group, sql_join))(rng)
