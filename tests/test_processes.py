"""Two processes train together: each learns from its share, both hold the same model, every image is judged once."""
import json
import subprocess
import sys
from pathlib import Path

import toy

PROGRAM = """
import json, sys
from pathlib import Path
sys.path.insert(0, sys.argv[1])
import toy
from moe_lab.train import processes
rank, count = processes()
metrics = toy.run(Path(sys.argv[2]), Path(sys.argv[3]), batch_size=4)
Path(sys.argv[3], f"rank{rank}.json").write_text(json.dumps(dict(count=count, metrics=metrics)))
"""


def test_two_processes(tmp_path):
    toy.write_dataset(tmp_path / "world")
    (tmp_path / "program.py").write_text(PROGRAM)
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", tmp_path / "program.py"]
    done = subprocess.run([*launch, Path(__file__).parent, tmp_path / "world", tmp_path / "out"], capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr
    first, second = (json.loads((tmp_path / "out" / f"rank{rank}.json").read_text()) for rank in range(2))
    assert first == second and first["count"] == 2
    images = {r["image_id"] for r in json.loads((tmp_path / "out" / "predictions.json").read_text())["val"]}
    assert images == set(range(1, 9))
    assert (tmp_path / "out" / "history.csv").read_text().count("\n") == 4
