"""The local launcher, with shell one-liners in place of training."""

import os
import signal
import subprocess
import time
from pathlib import Path

LAUNCHER = Path(__file__).parents[2] / "launch" / "local.sh"


def start(num_processes, script, **environment):
    return subprocess.Popen(
        [LAUNCHER, str(num_processes), "bash", "-c", script],
        env=os.environ | {"JAX_PLATFORMS": "cpu"} | environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def finish(launched):
    try:
        return launched.communicate(timeout=30)
    finally:
        launched.kill()


def test_each_process_knows_the_run_and_its_rank():
    script = 'echo "$SLMJAX_PROCESS_ID/$SLMJAX_NUM_PROCESSES at $SLMJAX_COORDINATOR"; printf "no newline"'
    launched = start(3, script, SLMJAX_PORT="4321")
    out, err = finish(launched)
    assert (launched.returncode, err) == (0, "")
    told = [f"[{rank}] {rank}/3 at localhost:4321" for rank in range(3)]
    assert sorted(out.splitlines()) == sorted(told + [f"[{rank}] no newline" for rank in range(3)])


def fails_when_the_others_are_ready(tmp_path, others):
    """A script whose rank 1 fails once every other rank has set its trap."""
    wait = "".join(f"until [ -e {tmp_path}/{rank} ]; do sleep 0.1; done; " for rank in others)
    return (
        f'if [ "$SLMJAX_PROCESS_ID" = 1 ]; then {wait} exit 7; fi; trap "$ON_TERM" TERM; '
        f"touch {tmp_path}/$SLMJAX_PROCESS_ID; while :; do sleep 0.1; done"
    )


def test_one_failure_ends_the_others_and_gives_the_status(tmp_path):
    launched = start(3, fails_when_the_others_are_ready(tmp_path, (0, 2)), ON_TERM="echo ended; exit 3")
    out, _ = finish(launched)
    assert launched.returncode == 7
    assert {"[0] ended", "[2] ended"} <= set(out.splitlines())


def test_a_failure_before_the_others_have_started(tmp_path):
    launched = start(8, '[ "$SLMJAX_PROCESS_ID" = 0 ] && exit 7; sleep 20')
    finish(launched)
    assert launched.returncode == 7


def test_a_process_that_does_not_end_after_a_failure_is_killed(tmp_path):
    launched = start(2, fails_when_the_others_are_ready(tmp_path, (0,)), ON_TERM="", SLMJAX_GRACE_SECONDS="1")
    finish(launched)
    assert launched.returncode == 7


def test_a_signal_reaches_all_once_and_nobody_is_hurried():
    """Rank 1 takes longer to save than the grace that a failure would leave it."""
    script = (
        "trap 'echo signal; [ $SLMJAX_PROCESS_ID = 1 ] && sleep 2; echo saved; exit 9' TERM;"
        "echo ready; while :; do sleep 0.1; done"
    )
    launched = start(2, script, SLMJAX_GRACE_SECONDS="0")
    assert launched.stdout is not None
    ready = {launched.stdout.readline() for _ in range(2)}
    assert ready == {"[0] ready\n", "[1] ready\n"}
    time.sleep(0.2)
    launched.send_signal(signal.SIGTERM)
    out, _ = finish(launched)
    assert launched.returncode == 9
    for rank in (0, 1):
        assert out.count(f"[{rank}] signal\n") == 1
        assert out.count(f"[{rank}] saved\n") == 1


def test_usage_is_printed_for_a_wrong_count():
    launched = subprocess.run([LAUNCHER, "0", "true"], capture_output=True, text=True, check=False)
    assert launched.returncode == 2
    assert "usage:" in launched.stderr
