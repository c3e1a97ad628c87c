"""A small history for benchmarks: one page for each room, and the team that booked it."""

import json


def write_rooms(path, count):
    """Write the history; what it was written to."""
    told = [
        {
            "seq": number,
            "type": "created",
            "doc_id": f"{number}.md",
            "path": f"{number}.md",
            "content": f"# Room {number}\n\nThe room {number} is booked by team {number * 7}.\n",
        }
        for number in range(count)
    ]
    path.write_text("".join(json.dumps(one) + "\n" for one in told))
    return path


def write_questions(path, count):
    """Write one question for each of the first rooms; what they were written to."""
    path.write_text("".join(f"Which team booked room {number}?\n" for number in range(count)))
    return path
