"""A small history for benchmarks: one page for each room, and the team that booked it."""

import json


def write_rooms(path, count):
    """Write the history; returns its path."""
    records = [
        {
            "seq": number,
            "type": "created",
            "doc_id": f"{number}.md",
            "path": f"{number}.md",
            "content": f"# Room {number}\n\nThe room {number} is booked by team {number * 7}.\n",
        }
        for number in range(count)
    ]
    path.write_text("".join(json.dumps(one) + "\n" for one in records))
    return path


def write_questions(path, count):
    """Write one question for each of the first rooms; returns their path."""
    path.write_text("".join(f"Which team booked room {number}?\n" for number in range(count)))
    return path
