"""Opens the event files of a run with TensorBoard's own reader and compares them with metrics.jsonl.

    python3 scripts/reference/event_files.py RUN

needs the package tensorboard. RUN is the folder of a training by zimage_8step, finished or not. Every number of
metrics.jsonl must be there at its update, once, and nothing else; every alarm as a text, every preview as its picture.
Run it too on a training that was killed and went on.
"""

import json
import math
import sys
from pathlib import Path

from tensorboard.backend.event_processing.event_accumulator import (
    EventAccumulator,
    IMAGES,
    SCALARS,
    TENSORS,
)

run = Path(sys.argv[1])
reader = EventAccumulator(str(run / "tensorboard"), size_guidance={SCALARS: 0, IMAGES: 0, TENSORS: 0})
reader.Reload()
tags = reader.Tags()

# What the page shows of a tag, by step.
shown = {}
for tag in tags[SCALARS]:
    for event in reader.Scalars(tag):
        assert (tag, event.step) not in shown, f"{tag} at {event.step} twice"
        shown[tag, event.step] = event.value
texts = {
    (tag, event.step): event.tensor_proto.string_val[0].decode()
    for tag in tags[TENSORS]
    for event in reader.Tensors(tag)
}
pictures = {event.step: event for event in reader.Images("preview")} if "preview" in tags[IMAGES] else {}

lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
numbers = alarms = previews = 0
by_name = {}
for (tag, step), value in shown.items():
    group, name = tag.split("/")
    name = {"gradient_norm": f"{name}_gradient", "learning_rate": f"{name}_learning_rate"}.get(group, name)
    if group != "time":
        by_name[group == "evaluation", name, step] = value
for line in lines:
    step = line.pop("update")
    line.pop("seconds", None)
    if "alarm" in line:
        text = texts["alarms", step]
        assert text, line
        alarms += 1
        continue
    if "skipped" in line:
        continue
    student = line.pop("student", None)
    if student is not None:
        picture = pictures.pop(step)
        path = run / f"preview-{step:06}.png"
        assert picture.encoded_image_string == path.read_bytes(), path
        previews += 1
        line = {name: student[name] for name in student if (True, name, step) in by_name}
    for name, value in line.items():
        found = by_name.pop((student is not None, name, step))
        assert math.isclose(found, value, rel_tol=1e-6, abs_tol=1e-30), (name, step, found, value)
        numbers += 1
assert not by_name, f"shown and not in metrics.jsonl: {sorted(by_name)}"
assert not pictures, f"previews that are not in metrics.jsonl: {sorted(pictures)}"
assert ("recipe", 0) in texts
print(f"{numbers} numbers, {alarms} alarms and {previews} previews are those of metrics.jsonl; tags: {len(tags[SCALARS])}")
