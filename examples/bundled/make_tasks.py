"""Write the three bundled demo tasks: ticket triage, question to SQL, handover notes.

    python examples/bundled/make_tasks.py            # writes src/tascade/bundled/data/

Every row is composed by the grammars below from closed sets of invented names and values, so
the tasks are small enough for the bundled model to learn and free of anybody's data. The answer
follows from the prompt alone: there is one right completion for each row. Same seed, same bytes.
"""

from __future__ import annotations

import argparse
import json
import random
from collections.abc import Callable, Iterator
from pathlib import Path

from sql_task import Pair, question

Row = dict[str, str]

SIZES = {"test": 200, "validation": 200, "train": 2000}
DATA = Path(__file__).resolve().parents[2] / "src" / "tascade" / "bundled" / "data"


def words(text: str) -> tuple[str, ...]:
    return tuple(text.split())


def table(text: str) -> list[tuple[list[str], list[str]]]:
    """Read ``head of words`` lines, each followed by indented phrases parted by bars."""
    entries: list[tuple[list[str], str]] = []
    for line in text.strip().splitlines():
        if line.startswith(" "):
            entries[-1] = (entries[-1][0], entries[-1][1] + line)
        else:
            entries.append((line.split(), ""))
    return [(head, [x.strip() for x in phrases.split("|")]) for head, phrases in entries]


FIRST = words("""
    Maria Omar Ines Tomas Priya Jonas Aisha Viktor Lena Mateo Nadia Felix Yuki Clara Samir Elena
    Bruno Hana Oscar Zoe Amir Greta Pavel Rosa Idris Noor Simon Tara Emil Leila
""")
LAST = words("""
    Chen Novak Silva Haddad Berg Rossi Patel Kowalski Moreau Adeyemi Tanaka Fischer Lopez Ivanova
    Hansen Okafor Weber Costa Larsen Mehta Dubois Santos Keller Nguyen Farah Lindgren Romero Varga
    Murphy Sato
""")


WOMEN = words("""
    Maria Ines Priya Aisha Lena Nadia Yuki Clara Elena Hana Zoe Greta Rosa Noor Tara Leila
""")
# Thirty people, not nine hundred names: copying surnames is the last thing a tiny model learns.
PEOPLE = tuple(f"{first} {last}" for first, last in zip(FIRST, LAST, strict=True))


# --- tickets: a support message to a triage record -------------------------------------------

PRODUCTS = words("Northdesk Paperlane Tallybook Rotaform Fieldlog Queuely Vaultory Mapwell")
PLANS = ("Free", "Starter", "Business", "Enterprise")
CHANNELS = ("email", "chat", "phone", "web form")
PRIORITIES = ("low", "normal", "high", "urgent")

# issue, category, team, tag; then the ways to say it
ISSUES = table("""
duplicate_charge billing payments invoice
    we were charged twice for {p} this month | the same {p} invoice was paid two times |
    my card shows two payments for {p} | there is a duplicate charge for {p} on our card
wrong_amount billing payments invoice
    the latest {p} invoice has the wrong amount | we were billed for more {p} seats than we use |
    our {p} bill is higher than the quote | the total on the {p} invoice does not match
card_declined billing payments card
    our card is declined when we renew {p} | the {p} renewal payment keeps failing |
    {p} does not accept our new card | I cannot update the card for {p}
plan_change account sales plan
    we want to move {p} to another plan | how do I upgrade our {p} subscription |
    we would like more seats in {p} | please change our {p} plan from next month
cancel_request account sales churn
    we would like to cancel {p} | please close our {p} subscription |
    we are leaving {p} at the end of the month | I want to stop the {p} renewal
login_failure access identity login
    I cannot log in to {p} | {p} says my password is wrong |
    the {p} login page sends me back to the start | my {p} account is locked
sso_error access identity sso
    single sign-on to {p} stopped working | SSO for {p} returns an error |
    our identity provider no longer connects to {p} | {p} rejects the SSO certificate
missing_permission access identity roles
    a new colleague cannot see our {p} workspace | I lost my admin role in {p} |
    {p} tells me that I have no permission | we need to change roles in {p}
suspicious_login security trust breach
    there was a login to {p} from a country we do not know | someone else used my {p} account |
    {p} warned me about an unknown device | we see strange sessions in {p}
phishing_report security trust phishing
    I got a fake email that pretends to be {p} | a false {p} login page is going around |
    someone sends messages in the name of {p} | we received a phishing link about {p}
app_crash bug engineering crash
    {p} crashes when I open a report | {p} closes by itself after a minute |
    the {p} app crashes at start | {p} freezes and then quits
slow_performance bug engineering speed
    {p} has been very slow since Monday | pages in {p} take a minute to load |
    searching in {p} takes far too long | {p} is slower than last week
sync_failure bug engineering sync
    {p} no longer syncs our files | changes in {p} do not reach my colleagues |
    the {p} sync stops halfway | two people see different data in {p}
export_error bug data export
    the export from {p} is empty | I cannot download a report from {p} |
    the {p} export stops with an error | the CSV file from {p} is broken
import_error bug data import
    {p} refuses our spreadsheet | the import into {p} fails at the last step |
    half of the rows are missing after the {p} import | {p} cannot read our CSV file
data_loss bug data recovery
    our notes in {p} are gone | a whole folder disappeared from {p} |
    {p} deleted the records of last week | I cannot find my old data in {p}
feature_request feedback product idea
    it would be great if {p} had a dark theme | could {p} send a weekly summary |
    please add a calendar view to {p} | we miss a bulk edit option in {p}
how_to question support guide
    how do I share a folder in {p} | where can I find the audit log in {p} |
    I would like to know how to archive a project in {p} | how do I invite a guest to {p}
api_limit question platform api
    what is the rate limit of the {p} API | our script reaches the {p} API limit |
    the {p} API answers with too many requests | can we raise the API quota for {p}
webhook_failure bug platform api
    webhooks from {p} do not arrive | {p} stopped calling our webhook |
    every {p} webhook times out | the {p} webhook sends an empty body
""")
TONES: tuple[tuple[str, str], ...] = (
    ("Hello team,", "neutral"),
    ("Good morning,", "neutral"),
    ("Hi,", "neutral"),
    ("Quick note:", "neutral"),
    ("Hi there, I love the service, but", "positive"),
    ("Thank you for the fast help last time. Now", "positive"),
    ("First of all, great product. Today", "positive"),
    ("I am getting frustrated:", "negative"),
    ("This is the third time I write:", "negative"),
    ("Honestly, this is not acceptable:", "negative"),
    ("I am disappointed that", "negative"),
)
IMPACTS: tuple[tuple[str, int], ...] = (
    ("There is no hurry.", 0),
    ("It is a small thing.", 0),
    ("Whenever you have time.", 0),
    ("It can wait until next week.", 0),
    ("It slows me down a little.", 1),
    ("I found a way around it for now.", 1),
    ("It affects one person here.", 1),
    ("I hope to hear from you this week.", 1),
    ("Several colleagues are affected.", 2),
    ("We have a deadline tomorrow.", 2),
    ("A client is waiting for us.", 2),
    ("It costs us hours every day.", 2),
    ("Nobody on our team can work.", 3),
    ("Our whole office has stopped.", 3),
    ("We are losing sales right now.", 3),
    ("This blocks our launch today.", 3),
)
DEVICES: tuple[Pair, ...] = (
    ("", ""),
    ("", ""),
    ("I use the Android app.", "android"),
    ("I use the iPhone app.", "ios"),
    ("It happens in Firefox.", "firefox"),
    ("It happens in Chrome.", "chrome"),
    ("We run the Windows client.", "windows"),
    ("This is on a Mac.", "mac"),
)
ASKS: tuple[Pair, ...] = (
    ("Please advise.", ""),
    ("Can you help?", ""),
    ("Thanks in advance.", ""),
    ("Please send the money back.", "refund"),
    ("We expect a refund.", "refund"),
    ("Please call me back.", "callback"),
    ("Can someone phone me today?", "callback"),
    ("A link to the manual is enough.", "docs"),
    ("Please point me to the right page.", "docs"),
    ("I can send a screenshot.", "screenshot"),
    ("A screenshot is attached.", "screenshot"),
)


def ticket(rng: random.Random) -> Pair:
    (issue, category, team, tag), texts = rng.choice(ISSUES)
    product, plan, channel = rng.choice(PRODUCTS), rng.choice(PLANS), rng.choice(CHANNELS)
    (tone, sentiment), (impact, level) = rng.choice(TONES), rng.choice(IMPACTS)
    (device, device_tag), (ask, ask_tag) = rng.choice(DEVICES), rng.choice(ASKS)
    customer, ref = rng.choice(PEOPLE), f"T-{rng.randrange(4000, 5000)}"
    level = min(3, max(level + (plan == "Enterprise"), 2 * (category == "security")))
    text = rng.choice(texts).format(p=product)
    text += "?" if text.split()[0] in ("how", "where", "could", "can", "what") else "."
    body = " ".join(x for x in (tone, text, device, impact, ask) if x)
    record = {
        "ref": ref,
        "customer": customer,
        "plan": plan.lower(),
        "channel": channel,
        "category": category,
        "issue": issue,
        "product": product,
        "priority": PRIORITIES[level],
        "team": team,
        "sentiment": sentiment,
        "tags": [x for x in (tag, device_tag, ask_tag) if x],
        "needs_human": level == 3 or category == "security" or ask_tag == "callback",
    }
    prompt = f"Ticket {ref} from {customer}, {plan} plan, by {channel}:\n{body}"
    return prompt, json.dumps(record)


# --- notes: the fields of a ward round to a shift handover note -------------------------------

WARDS = words("Maple Cedar Willow Birch")
REASONS = (
    "pneumonia",
    "hip replacement",
    "chest pain",
    "heart failure",
    "cellulitis",
    "kidney infection",
    "wrist fracture",
    "asthma attack",
    "dehydration",
    "knee surgery",
    "gallstones",
    "a minor stroke",
)
MEDICINES = (
    "paracetamol 1 g",
    "ibuprofen 400 mg",
    "codeine 30 mg",
    "morphine 5 mg",
    "naproxen 250 mg",
)
DIETS = ("normal", "soft", "low salt", "diabetic", "fluids only", "nil by mouth")
MOBILITY = {
    "independent": "walks without help",
    "one helper": "walks with one helper",
    "frame": "walks with a frame",
    "wheelchair": "uses a wheelchair",
    "bed rest": "stays in bed",
}
PLANS_NEXT = (
    "blood tests in the morning",
    "chest X-ray tomorrow",
    "physiotherapy at 10:00",
    "review by the surgeon",
    "wound check at noon",
    "discharge planned for Friday",
    "dietician visit",
    "repeat ECG tonight",
    "remove the drip",
    "call the family",
)
TIMES = ("06:00", "07:30", "14:00", "15:30", "22:00", "23:30")
PRESSURES = ("104/62", "112/70", "118/76", "124/80", "132/84", "146/90", "158/96", "172/98")
TEMPERATURES = ("36.4", "36.8", "37.1", "37.4", "37.9", "38.2", "38.6", "39.1")


def note(rng: random.Random) -> Pair:
    patient, age = rng.choice(PEOPLE), rng.randint(21, 94)
    sex = "F" if patient.split()[0] in WOMEN else "M"
    ward, bed, time = rng.choice(WARDS), rng.randint(10, 39), rng.choice(TIMES)
    reason, pressure, pulse = rng.choice(REASONS), rng.choice(PRESSURES), rng.randint(52, 99)
    temperature, oxygen, pain = rng.choice(TEMPERATURES), rng.randint(88, 99), rng.randint(0, 9)
    medicine = rng.choice(MEDICINES) if pain else "none"
    diet, mobility = rng.choice(DIETS), rng.choice(sorted(MOBILITY))
    plans = rng.sample(PLANS_NEXT, rng.randint(1, 2))
    fields = {
        "patient": f"{patient}, {sex}, {age}",
        "ward": f"{ward}, bed {bed}",
        "reason": reason,
        "time": time,
        "BP": pressure,
        "pulse": pulse,
        "temp": temperature,
        "SpO2": f"{oxygen}%",
        "pain": pain,
        "given": medicine,
        "diet": diet,
        "mobility": mobility,
        "next": "; ".join(plans),
    }
    she = "She" if sex == "F" else "He"
    text = [
        f"{patient}, aged {age}, is in bed {bed} on {ward} ward with {reason}.",
        f"At {time} the blood pressure was {pressure}, pulse {pulse}, temperature "
        f"{temperature} and oxygen saturation {oxygen}%.",
    ]
    if float(temperature) >= 38:
        text.append(f"{she} has a fever; repeat the temperature in one hour.")
    if oxygen < 92:
        text.append("Oxygen is low; the doctor has been told.")
    text.append(
        f"Pain is {pain} out of 10 and {she.lower()} was given {medicine}."
        if pain
        else f"{she} reports no pain."
    )
    text.append(
        f"{she} {MOBILITY[mobility]} and is {diet}."
        if diet == "nil by mouth"
        else f"{she} {MOBILITY[mobility]} and is on a {diet} diet."
    )
    text.append(f"Next: {' and '.join(plans)}.")
    prompt = "Handover note\n" + "\n".join(f"{key}: {value}" for key, value in fields.items())
    return prompt, " ".join(text)


# --- splits -----------------------------------------------------------------------------------

TASKS: dict[str, Callable[[random.Random], Pair]] = {
    "tickets": ticket,
    "sql": question,
    "notes": note,
}


def rows(task: str, split: str, count: int, taken: set[str]) -> Iterator[Row]:
    """``count`` rows of a split; their prompts are new to ``taken``, and are added to it."""
    rng = random.Random(f"tascade/{task}/{split}")  # a string seeds alike on every platform
    made = 0
    while made < count:
        prompt, completion = TASKS[task](rng)
        if prompt in taken:
            continue
        taken.add(prompt)
        yield {"id": f"{task}-{split}-{made:05d}", "prompt": prompt, "completion": completion}
        made += 1


def splits(task: str) -> dict[str, list[Row]]:
    """The committed splits. Test is drawn first: no later split can hold one of its prompts."""
    taken: set[str] = set()
    return {split: list(rows(task, split, count, taken)) for split, count in SIZES.items()}


def extra_train(task: str, count: int) -> list[Row]:
    """More rows to train a model on, none with a prompt of the committed splits."""
    taken = {row["prompt"] for part in splits(task).values() for row in part}
    return list(rows(task, "extra", count, taken))


def lines(part: list[Row]) -> str:
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in part)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--out", type=Path, default=DATA)
    out = parser.parse_args().out
    for task in TASKS:
        parts = splits(task)
        (out / task).mkdir(parents=True, exist_ok=True)
        for split, part in parts.items():
            (out / task / f"{split}.jsonl").write_text(lines(part), encoding="utf-8")
        seen = {row["completion"] for row in parts["train"]}
        again = sum(row["completion"] in seen for row in parts["test"])
        print(f"{task}: {again} of {SIZES['test']} test completions occur whole in train")


if __name__ == "__main__":
    main()
