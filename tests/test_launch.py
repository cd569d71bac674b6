"""The scripts that start training elsewhere: what they would run, what they refuse, and how they end.

No cloud is asked: programs of clouds are stand-ins that write down how they were called.
"""

import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.manifests import JOBSET, SKYPILOT, XPK, unfit

yaml = pytest.importorskip("yaml", reason="manifests are read with PyYAML")
ROOT = Path(__file__).resolve().parents[1]
PODS = ROOT / "launch" / "pods"
SCRIPTS = sorted([*(ROOT / "launch").glob("*.sh"), *PODS.glob("*.sh")])
TRAINING = ["--config=configs/decoder64.py", "--workdir=gs://bucket/a run", '--config.data.path=/d/$x "y"']
NEEDED = {
    "host.sh": [],
    "slurm.sh": [],
    "tpu.sh": ["--name=n", "--project=p", "--zone=z", "--type=v5p-128"],
    "gke.sh": [
        "--name=n",
        "--image=r/i:tpu",
        "--accelerator=tpu-v5p-slice",
        "--topology=4x4x4",
        "--hosts=16",
    ],
}

if shutil.which("bash") is None:
    pytest.skip("the scripts are for bash", allow_module_level=True)


def bash(
    script: str, *arguments: str, path: Path | None = None, **environment
) -> subprocess.CompletedProcess:
    """A script of launch/pods run to its end; `path` holds stand-ins for other programs."""
    environment = os.environ | environment
    if path:
        environment["PATH"] = f"{path}:{environment['PATH']}"
    command = ["bash", str(PODS / script), *arguments]
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=120)


def stand_in(folder: Path, name: str, lines: str = "") -> None:
    """A program of this name that notes its words in calls.txt, and then runs `lines`."""
    program = folder / name
    program.write_text(f'#!/usr/bin/env bash\nprintf "%s\\n" "{name} $*" >> "{folder}/calls.txt"\n{lines}\n')
    program.chmod(0o755)


def shell_words(text: str) -> list[str]:
    """The words that a shell reads in a line."""
    said = subprocess.run(["bash", "-c", f"printf '%s\\0' {text}"], capture_output=True, text=True)
    return said.stdout.split("\0")[:-1]


def installed(folder: Path, training: str, root: Path = ROOT, extras: str = "train") -> dict[str, str]:
    """Variables for launch/env.sh: an environment that counts as installed, whose Python runs, in the place
    of dalle2_jax.train, the lines `training`."""
    programs = folder / "environment" / "bin"
    programs.mkdir(parents=True)
    stand_in(programs, "python", f'case "$*" in\n*dalle2_jax.train*)\n{training}\n;;\nesac')
    state = subprocess.run("cat setup.py constraints.txt | cksum", shell=True, cwd=ROOT, capture_output=True)
    stamp = programs.parent / f"installed-{extras.replace(',', '-')}"
    stamp.write_text(f"{root} {state.stdout.decode()}")
    return dict(DALLE2_JAX_VENV=str(programs.parent), EXTRAS="")


SAVING = (
    'trap \'echo saved >> "$NOTES"; exit 0\' TERM; echo ready >> "$NOTES"; while :; do /bin/sleep 0.05; done'
)


def stopped(command: list[str], notes: Path, **environment) -> tuple[int, str]:
    """(status, notes) of a command that is told to stop by SIGTERM once training has begun."""
    running = subprocess.Popen(command, cwd=ROOT, env=os.environ | environment | dict(NOTES=str(notes)))
    try:
        deadline = time.monotonic() + 30
        while not (notes.exists() and "ready" in notes.read_text()) and time.monotonic() < deadline:
            assert running.poll() is None
            time.sleep(0.02)
        running.send_signal(signal.SIGTERM)
        return running.wait(30), notes.read_text()
    finally:
        running.kill()


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.name)
def test_scripts_are_bash(script):
    assert subprocess.run(["bash", "-n", str(script)], capture_output=True).returncode == 0
    if shutil.which("shellcheck") is None:
        pytest.skip("shellcheck is not installed: bash read the script, nothing more was looked at")
    left_out = "SC2154,SC1091,SC1087"  # variables that `parse` sets; files that are sourced; pip's brackets
    found = subprocess.run(
        ["shellcheck", "-s", "bash", "-x", "-S", "warning", "-e", left_out, str(script)],
        capture_output=True,
        text=True,
    )
    assert found.returncode == 0, found.stdout


@pytest.mark.parametrize(
    ("arguments", "whole"),
    [([], True), (["--all"], True), (["tests/test_docs.py"], False), (["--all", "-k", "resume"], False)],
)
@pytest.mark.parametrize("fails", ["", "ruff", "mypy"])
def test_the_whole_suite_has_its_types_checked_and_fails_with_them(tmp_path, arguments, whole, fails):
    variables = installed(tmp_path, "", extras="train,eval,test") | dict(TEST_WORKERS="1")
    variables |= dict(DALLE2_JAX_CACHE=str(tmp_path / "cache"))
    programs = tmp_path / "environment" / "bin"
    stand_in(programs, "ruff", f"exit {int(fails == 'ruff')}")
    stand_in(programs, "mypy", f'echo "mypy keeps $MYPY_CACHE_DIR"\nexit {int(fails == "mypy")}')
    command = ["bash", str(ROOT / "launch" / "test.sh"), *arguments]
    done = subprocess.run(
        command, env=os.environ | variables, capture_output=True, text=True, timeout=60, check=False
    )
    calls = (programs / "calls.txt").read_text()
    assert "python -m pytest" in calls and ("mypy" in calls) == whole, done.stderr
    assert (f"mypy keeps {tmp_path}/cache/mypy" in done.stdout) == whole
    assert done.returncode == int(fails == "ruff" or (fails == "mypy" and whole)), done.stderr


@pytest.mark.parametrize("script", NEEDED)
def test_help_is_the_comment_at_the_top(script):
    said = bash(script, "--help")
    assert said.returncode == 0 and "-- --config=" in re.sub(r"\s*\\\n\s*", " ", said.stdout)


@pytest.mark.parametrize("script", NEEDED)
def test_what_is_missing_or_misspelt_is_said_first(script, tmp_path):
    for arguments, part in (
        (["--nmae=x", "--", *TRAINING], "there is no --nmae"),
        (["name", "--", *TRAINING], "name is not --name=value"),
        ([*NEEDED[script], "--", "--config=configs/clip.py"], "training needs --workdir="),
        (["--", *TRAINING], None if script in ("host.sh", "slurm.sh") else "give --"),
    ):
        if part:
            said = bash(script, *arguments, path=tmp_path)
            assert said.returncode == 2 and part in said.stderr, said


@pytest.mark.parametrize("script", ["host.sh", "slurm.sh"])
def test_training_gets_its_arguments_untouched(script):
    said = bash(script, "--dry-run", "--", *TRAINING)
    assert said.returncode == 0
    words = subprocess.run(["bash", "-c", f"printf '%s\\n' {said.stdout}"], capture_output=True, text=True)
    assert words.stdout.splitlines()[-3:] == TRAINING


# This machine


@pytest.mark.parametrize(
    ("statuses", "retries", "ended", "tries"),
    [
        ([0], 3, 0, 1),
        ([1, 4, 0], 3, 0, 3),
        ([1, 1, 1], 1, 1, 2),
        ([1, 0], 0, 1, 1),
        ([1, 2, 0], 3, 2, 2),
        ([3, 0], 3, 3, 1),
    ],
)
def test_a_host_starts_again_after_what_may_pass(tmp_path, statuses, retries, ended, tries):
    for i, status in enumerate(statuses):
        (tmp_path / f"status{i}").write_text(str(status))
    training = 'for file in "$WHERE"/status*; do status="$(cat "$file")"; rm "$file"; exit "$status"; done'
    environment = installed(tmp_path, training) | dict(WHERE=str(tmp_path))
    said = bash("host.sh", f"--retries={retries}", "--", *TRAINING, **environment)
    assert said.returncode == ended, said.stderr
    calls = (tmp_path / "environment" / "bin" / "calls.txt").read_text().splitlines()
    begun = [line for line in calls if "dalle2_jax.train" in line]
    assert begun == [f"python -m dalle2_jax.train {' '.join(TRAINING)}"] * tries
    assert said.stderr.count("again from the last checkpoint") == tries - 1


def test_a_host_that_is_told_to_stop_saves_and_does_not_start_again(tmp_path):
    environment = installed(tmp_path, SAVING)
    command = ["bash", str(PODS / "host.sh"), "--retries=3", "--", *TRAINING]
    status, notes = stopped(command, tmp_path / "notes", **environment)
    assert (status, notes) == (0, "ready\nsaved\n")


@pytest.mark.parametrize("begun", [1, 2])
def test_a_host_that_is_told_to_stop_as_training_begins_tells_it(tmp_path, begun):
    """SIGTERM once training has been started for the first or the second time, and before its id is noted."""
    training = f"""
echo begun >> "$NOTES"
[ "$(wc -l < "$NOTES")" = {begun} ] || exit 1
trap 'echo saved >> "$NOTES"; exit 0' TERM
echo ready >> "$NOTES"
for i in $(seq 60); do /bin/sleep 0.05; done
echo trained on >> "$NOTES"
"""
    (tmp_path / "strike").write_text("""
unset BASH_ENV
strike() {
  [[ $BASH_COMMAND == 'child=$!'* ]] || return 0
  until grep -qx ready "$NOTES" || ! kill -0 $!; do /bin/sleep 0.02; done 2> /dev/null
  if grep -qx ready "$NOTES"; then echo struck >> "$NOTES"; kill -TERM $$; fi
}
set -o functrace
trap strike DEBUG
""")
    notes = tmp_path / "notes"
    environment = installed(tmp_path, training) | dict(NOTES=str(notes), BASH_ENV=str(tmp_path / "strike"))
    said = bash("host.sh", "--retries=3", "--", *TRAINING, **environment)
    assert (said.returncode, said.stderr.count("again from")) == (0, begun - 1), said.stderr
    assert notes.read_text().split() == ["begun"] * begun + ["ready", "struck", "saved"]


def test_an_installation_that_fails_has_its_own_status(tmp_path):
    stand_in(tmp_path, "sleep")
    environment = installed(tmp_path, "exit 0")
    (tmp_path / "environment" / "installed-train").unlink()
    python = tmp_path / "environment" / "bin" / "python"
    python.write_text(python.read_text() + 'case "$*" in *"pip install"*) exit 1 ;; esac\n')
    said = bash("host.sh", "--retries=3", "--", *TRAINING, path=tmp_path, **environment)
    assert said.returncode == 5 and "the installation failed" in said.stderr


# Cloud TPU


def test_a_slice_is_asked_for_used_and_given_back():
    said = bash("tpu.sh", "--dry-run", *NEEDED["tpu.sh"], "--spot=yes", "--setup=mount it", "--", *TRAINING)
    lines = said.stdout.splitlines()
    assert said.returncode == 0 and len(lines) == 6
    assert "queued-resources create n --node-id=n --project=p --zone=z --accelerator-type=v5p-128" in lines[0]
    assert lines[0].endswith("--spot") and "tpu-vm scp" in lines[2] and "--worker=all" in lines[3]
    remote = shell_words(lines[4])[-1].removeprefix("--command=")
    start = "cd dalle2_jax && EXTRAS=tpu bash launch/pods/job.sh bash launch/pods/host.sh -- "
    assert remote.startswith(start) and shell_words(remote.removeprefix(start)) == TRAINING
    assert "mount\\ it" in lines[3] and "queued-resources delete n" in lines[5]


# The file `state` has the slice's states, a line for each time that it is asked for, the last one for ever;
# `queue` has those of the next slice; the others a line for each time that gcloud fails.
GCLOUD = """
fails() {
  [ -s "$WHERE/$1" ] || return 1
  sed -i 1d "$WHERE/$1"
  echo "ERROR: no answer" >&2
}
case "$*" in
  *create*)
    fails create && exit 1
    [ ! -e "$WHERE/state" ] || { echo "ERROR: ALREADY_EXISTS" >&2; exit 1; }
    if [ -s "$WHERE/queue" ]; then mv "$WHERE/queue" "$WHERE/state"; else echo ACTIVE > "$WHERE/state"; fi
    ! fails heard || exit 1 ;;
  *delete*)
    fails delete && { printf 'DELETING\nDELETING\nNOT_FOUND\n' > "$WHERE/state"; exit 1; }
    rm -f "$WHERE/state" ;;
  *describe*)
    fails silent && exit 1
    now="$(head -n 1 "$WHERE/state" 2> /dev/null)" || now=NOT_FOUND
    [ ! -e "$WHERE/state" ] || [ "$(wc -l < "$WHERE/state")" = 1 ] || sed -i 1d "$WHERE/state"
    [ "$now" != NOT_FOUND ] || { rm -f "$WHERE/state"; echo "ERROR: NOT_FOUND" >&2; exit 1; }
    echo "$now" ;;
  *host.sh*) echo again >> "$WHERE/attempts"; attempt="$(wc -l < "$WHERE/attempts")"
"""


def slices(tmp_path: Path, trains: str, *settings: str, **environment):
    """(how tpu.sh ended, calls) with a stand-in for gcloud whose training is `trains`; nobody waits, and
    who would for ever is ended."""
    stand_in(tmp_path, "sleep", f"""[ "$(grep -c '^sleep' "{tmp_path}/calls.txt")" -lt 60 ] || kill $PPID""")
    stand_in(tmp_path, "gcloud", f"{GCLOUD}\n{trains}\n;;\nesac")
    arguments = [*NEEDED["tpu.sh"], *settings, "--", *TRAINING]
    scratch = tmp_path / "scratch"
    scratch.mkdir()
    said = bash("tpu.sh", *arguments, path=tmp_path, WHERE=str(tmp_path), TMPDIR=str(scratch), **environment)
    assert not any(scratch.iterdir()), "temporary files stay"
    return said, (tmp_path / "calls.txt").read_text()


@pytest.mark.parametrize(("status", "attempts"), [(0, 1), (3, 1), (2, 1), (5, 1), (1, 2)])
def test_a_slice_that_is_taken_away_is_asked_for_again(tmp_path, status, attempts):
    """Training fails once with status 1 while its slice vanishes, then ends well; or ends otherwise."""
    trains = f"""
if [ {status} = 1 ]; then [ "$attempt" != 1 ] || {{ rm "$WHERE/state"; exit 1; }}; else exit {status}; fi"""
    said, calls = slices(tmp_path, trains)
    assert said.returncode == (0 if status == 1 else status), said.stderr
    assert calls.count("create n") == attempts and calls.count("host.sh") == attempts
    assert not (tmp_path / "state").exists()  # given back


def test_a_run_that_was_stopped_and_saved_is_not_taken_for_finished(tmp_path):
    """What is started on the host gets SIGTERM, and training saves and ends with 0, as the slice is taken
    away; with the next slice it goes on, and ends by itself."""
    (tmp_path / "dalle2_jax").symlink_to(ROOT)
    training = f'[ "$(wc -l < "$WHERE/attempts")" = 1 ] || exit 0\n{SAVING}'
    extras = dict(root=tmp_path / "dalle2_jax", extras="train,tpu")
    environment = installed(tmp_path, training, **extras)
    trains = """
cd "$WHERE/dalle2_jax"
command="${*: -1}"
eval "exec env ${command#*&& }" &
if [ "$attempt" = 1 ]; then
  until [ -e "$NOTES" ] || ! kill -0 $!; do /bin/sleep 0.05; done
  rm "$WHERE/state"
  kill -TERM $!
fi
wait $!"""
    said, calls = slices(tmp_path, trains, NOTES=str(tmp_path / "notes"), **environment)
    assert said.returncode == 0, said.stderr
    assert (tmp_path / "notes").read_text() == "ready\nsaved\n"
    assert calls.count("create n") == 2 and calls.count("host.sh") == 2
    assert not (tmp_path / "state").exists()


def test_a_failure_on_a_slice_that_stays_is_tried_again_so_often(tmp_path):
    said, calls = slices(tmp_path, "exit 1", "--retries=2")
    assert said.returncode == 1 and "given up after 2 retries" in said.stderr
    assert calls.count("create n") == 1 and calls.count("host.sh") == 3
    assert not (tmp_path / "state").exists()  # given back


def test_every_slice_has_its_retries(tmp_path):
    """Two failures, the second with the slice; two more on the next one; then it ends well."""
    trains = """case "$attempt" in 1 | 3 | 4) exit 1 ;; 2) rm "$WHERE/state"; exit 1 ;; esac"""
    said, calls = slices(tmp_path, trains, "--retries=2", "--keep=yes")
    assert said.returncode == 0, said.stderr
    assert calls.count("create n") == 2 and calls.count("host.sh") == 5
    assert (tmp_path / "state").exists()  # kept


@pytest.mark.parametrize("times", [2, 7])
def test_a_cloud_that_does_not_answer_has_not_taken_the_slice_away(tmp_path, times):
    trains = f"""[ "$attempt" != 1 ] || {{ printf 'x\\n%.0s' $(seq {times}) > "$WHERE/silent"; exit 1; }}"""
    said, calls = slices(tmp_path, trains)
    assert said.returncode == 0, said.stderr
    assert not (tmp_path / "silent").read_text() and ("no answer" in said.stderr) == (times == 7)
    assert calls.count("create n") == 1 and calls.count("host.sh") == 2


LOSES_IT_ONCE = """[ "$attempt" != 1 ] || { rm "$WHERE/state"; exit 1; }"""


def test_a_request_that_fails_after_a_slice_was_taken_away_is_made_again(tmp_path):
    trains = LOSES_IT_ONCE.replace("exit 1", 'printf "x\\nx\\n" > "$WHERE/create"; exit 1')
    said, calls = slices(tmp_path, trains)
    assert said.returncode == 0, said.stderr
    assert said.stderr.count("asking failed; again") == 2 and not (tmp_path / "create").read_text()
    assert calls.count("create n") == 4 and calls.count("host.sh") == 2


@pytest.mark.parametrize(
    ("fails", "times", "part"), [("create", 1, "could not be asked for"), ("silent", 9, "whether n is there")]
)
def test_a_first_request_that_fails_is_the_end(tmp_path, fails, times, part):
    (tmp_path / fails).write_text("x\n" * times)
    said, calls = slices(tmp_path, "exit 0")
    assert said.returncode == 2 and part in said.stderr and "no answer" in said.stderr
    assert calls.count("create n") == (fails == "create") and "host.sh" not in calls


@pytest.mark.parametrize("first", [True, False])
def test_a_request_that_was_heard_though_it_failed_is_not_made_again(tmp_path, first):
    """It would be refused, as there is a slice of this name now."""
    if first:
        (tmp_path / "heard").write_text("x\n")
    trains = "exit 0" if first else LOSES_IT_ONCE.replace("exit 1", 'echo x > "$WHERE/heard"; exit 1')
    said, calls = slices(tmp_path, trains)
    assert said.returncode == 0, said.stderr
    assert "asking failed; again" in said.stderr and not (tmp_path / "heard").read_text()
    assert "ALREADY_EXISTS" not in said.stderr and calls.count("create n") == 2 - first
    assert not (tmp_path / "state").exists()  # given back


@pytest.mark.parametrize("queue", ["CREATING\nACCEPTED\nNOT_FOUND\n", "NOT_FOUND\n"])
def test_a_slice_that_vanishes_while_it_is_waited_for_is_asked_for_again(tmp_path, queue):
    (tmp_path / "queue").write_text(queue)
    said, calls = slices(tmp_path, "exit 0")
    assert said.returncode == 0, said.stderr
    assert not (tmp_path / "queue").exists() and calls.count("create n") == 2 and calls.count("host.sh") == 1


def test_a_slice_whose_deletion_seemed_to_fail_is_asked_for_again_once_it_is_gone(tmp_path):
    (tmp_path / "queue").write_text("ACTIVE\nSUSPENDED\n")
    (tmp_path / "delete").write_text("x\n")
    said, calls = slices(tmp_path, """[ "$attempt" != 1 ] || exit 1""")
    assert said.returncode == 0, said.stderr
    assert "n: DELETING" in said.stdout and not (tmp_path / "delete").read_text()
    assert calls.count("create n") == 2 and calls.count("host.sh") == 2


@pytest.mark.parametrize(("failures", "deletions", "told"), [(1, 2, False), (9, 5, True)])
def test_giving_back_is_tried_again_and_does_not_change_the_status(tmp_path, failures, deletions, told):
    (tmp_path / "delete").write_text("x\n" * failures)
    said, calls = slices(tmp_path, "exit 3")
    assert said.returncode == 3, said.stderr
    assert calls.count("delete n") == deletions and ("could not be given back" in said.stderr) == told


# Kubernetes


@pytest.mark.parametrize(
    ("path", "value", "why"),
    [
        ("spec.failurePolicy.maxRestart", 3, "maxRestart is unknown"),
        ("spec.failurePolicy.rules.0.action", "Fail", "action is 'Fail'"),
        ("spec.replicatedJobs.0.replicas", "2", "replicas is '2'"),
        (
            "spec.replicatedJobs.0.template.spec.template.spec.restartPolicy",
            "Always",
            "restartPolicy is 'Always'",
        ),
        ("spec.replicatedJobs.0.template.spec.template.spec.containers", [], "containers is []"),
        ("spec.replicatedJobs.0.template.spec.template.spec.nodeSelector", {"a": 4}, "nodeSelector.a is 4"),
        ("metadata", {}, "metadata.name is missing"),
        ("spec", [], "spec is []"),
    ],
)
def test_a_wrong_manifest_is_found(path, value, why):
    found = yaml.safe_load(bash("gke.sh", *NEEDED["gke.sh"], "--", *TRAINING).stdout)
    assert unfit(found, JOBSET) == []
    *outer, last = path.split(".")
    place = found
    for name in outer:
        place = place[int(name) if name.isdigit() else name]
    place[last] = value
    (line,) = unfit(found, JOBSET)
    assert why in line


def test_the_jobset_is_what_its_definition_asks_for():
    """The fields of jobset.x-k8s.io/v1alpha2 and batch/v1 that matter here, in their places and types."""
    said = bash("gke.sh", *NEEDED["gke.sh"], "--slices=2", "--volume=shards", "--", *TRAINING)
    assert said.returncode == 0, said.stderr
    found = yaml.safe_load(said.stdout)
    assert unfit(found, JOBSET) == []
    (slices,) = found["spec"]["replicatedJobs"]
    job = slices["template"]["spec"]
    assert slices["replicas"] == 2 and job["parallelism"] == job["completions"] == 16
    assert job["completionMode"] == "Indexed" and job["backoffLimit"] == 0
    pod = job["template"]["spec"]
    assert pod["restartPolicy"] == "Never"  # else podFailurePolicy is refused
    (rule,) = job["podFailurePolicy"]["rules"]
    assert rule["action"] == "FailJob" and rule["onExitCodes"]["values"] == [2, 3]
    (container,) = pod["containers"]
    assert rule["onExitCodes"]["containerName"] == container["name"]
    assert container["command"] == ["bash", "launch/pods/job.sh"]
    assert container["args"] == ["python", "-m", "dalle2_jax.train", *TRAINING]
    assert container["resources"]["limits"] == {"google.com/tpu": 4} == container["resources"]["requests"]
    assert pod["nodeSelector"]["cloud.google.com/gke-tpu-topology"] == "4x4x4"
    (volume,) = pod["volumes"]
    assert container["volumeMounts"] == [{"name": volume["name"], "mountPath": "/data"}]
    assert pod["terminationGracePeriodSeconds"] == 600
    bare = yaml.safe_load(bash("gke.sh", *NEEDED["gke.sh"], "--", *TRAINING).stdout)
    assert "volumes" not in bare["spec"]["replicatedJobs"][0]["template"]["spec"]["template"]["spec"]


@pytest.mark.parametrize(
    ("changes", "part"),
    [
        (["--hosts=many"], "--hosts=many must be a whole number"),
        (["--name=A b"], "lower-case letters"),
        (["--xpk=c"], "--xpk needs --type"),
        (["--hosts="], "give --hosts"),
    ],
)
def test_a_jobset_that_cannot_be_is_refused(changes, part):
    said = bash("gke.sh", *NEEDED["gke.sh"], *changes, "--", *TRAINING)
    assert said.returncode == 2 and part in said.stderr and not said.stdout


def test_xpk_gets_the_same_job(tmp_path):
    """With its own options: ten minutes to save, and again after what may pass (127 and above of itself)."""
    stand_in(tmp_path, "xpk", f'printf "%s\\0" "$@" > {tmp_path}/words')
    settings = ["--name=n", "--image=r/i:tpu", "--xpk=c", "--type=v5p-128", "--slices=2", "--restarts=7"]
    said = bash("gke.sh", *settings, "--", *TRAINING, path=tmp_path)
    assert said.returncode == 0, said.stderr
    workload, create, *options = (tmp_path / "words").read_text().split("\0")[:-1]
    given = dict(option.removeprefix("--").split("=", 1) for option in options)
    assert (workload, create) == ("workload", "create") and given.keys() <= XPK
    start = ["bash", "launch/pods/job.sh", "python", "-m", "dalle2_jax.train"]
    assert shell_words(given.pop("command")) == [*start, *TRAINING]
    assert given == {
        "cluster": "c",
        "workload": "n",
        "docker-image": "r/i:tpu",
        "tpu-type": "v5p-128",
        "num-slices": "2",
        "max-restarts": "7",
        "termination-grace-period-seconds": "600",
        "restart-on-exit-codes": "1,4",
    }


def test_a_stopped_job_is_not_taken_for_finished(tmp_path):
    """job.sh passes SIGTERM on, waits for what it runs, and ends with 143; else with its status."""
    saving = (
        "import signal, sys, time\n"
        "def save(*_): time.sleep(0.5); open(sys.argv[1], 'w').write('saved'); sys.exit(0)\n"
        "signal.signal(signal.SIGTERM, save)\nprint('ready', flush=True)\ntime.sleep(60)\n"
    )
    command = ["bash", str(PODS / "job.sh"), sys.executable, "-c", saving, str(tmp_path / "saved")]
    running = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    assert running.stdout.readline() == "ready\n"
    running.send_signal(signal.SIGTERM)
    assert running.wait(30) == 143 and (tmp_path / "saved").read_text() == "saved"
    for status in (0, 3):
        assert bash("job.sh", sys.executable, "-c", f"raise SystemExit({status})").returncode == status


# Slurm


def test_a_preempted_job_is_queued_again_and_a_finished_one_is_not(tmp_path):
    stand_in(tmp_path, "scontrol", "")
    stand_in(
        tmp_path,
        "srun",
        'trap "exit 0" TERM\nfor i in $(seq 600); do [ -e "$STOP" ] && exit 0; sleep 0.1; done',
    )
    environment = os.environ | {
        "PATH": f"{tmp_path}:{os.environ['PATH']}",
        "SLURM_JOB_ID": "77",
        "SLURM_SUBMIT_DIR": str(ROOT),
        "STOP": str(tmp_path / "stop"),
    }
    command = ["bash", str(PODS / "slurm.sh"), "--", *TRAINING]
    calls = tmp_path / "calls.txt"
    running = subprocess.Popen(command, env=environment, cwd=tmp_path)
    deadline = time.monotonic() + 30
    while not calls.exists() and time.monotonic() < deadline:
        time.sleep(0.05)
    time.sleep(0.3)  # until the traps are set
    running.send_signal(signal.SIGTERM)
    assert running.wait(30) == 0
    assert calls.read_text().splitlines()[-1] == "scontrol requeue 77"
    calls.unlink()
    (tmp_path / "stop").touch()
    assert subprocess.run(command, env=environment, cwd=tmp_path, timeout=60).returncode == 0
    assert "scontrol" not in calls.read_text() and "-m dalle2_jax.train" in calls.read_text()


@pytest.fixture
def submitted(tmp_path):
    """Variables of a Slurm job that was submitted from a repository which has launch/ and nothing else."""
    (tmp_path / "repository").mkdir()
    (tmp_path / "repository" / "launch").symlink_to(ROOT / "launch")
    return dict(SLURM_JOB_ID="77", SLURM_SUBMIT_DIR=str(tmp_path / "repository"))


def slurm_ends(tmp_path: Path, job: dict[str, str], status: int, restarts: int, *settings: str) -> bool:
    """Whether the job is queued again once its step has ended with `status`, after so many restarts."""
    stand_in(tmp_path, "scontrol", "")
    stand_in(tmp_path, "srun", f"exit {status}")
    (tmp_path / "calls.txt").unlink(missing_ok=True)
    restarted = dict(SLURM_RESTART_COUNT=str(restarts)) if restarts else {}
    said = bash("slurm.sh", *settings, "--", *TRAINING, path=tmp_path, **job, **restarted)
    assert said.returncode == status, said.stderr
    return "scontrol requeue 77" in (tmp_path / "calls.txt").read_text()


@pytest.mark.parametrize(("status", "again"), [(4, True), (137, True), (0, False), (2, False), (3, False)])
@pytest.mark.parametrize("restarts", [0, 5])
def test_a_lost_process_is_tried_again_and_a_failure_is_not(tmp_path, submitted, status, again, restarts):
    """Whatever number of times the job was queued again for its time limit."""
    assert slurm_ends(tmp_path, submitted, status, restarts) == again


def test_lost_processes_are_counted_and_nothing_stays_of_it(tmp_path, submitted):
    """Two retries are two losses, with a time limit before and between them; another job begins anew."""

    def counted() -> bool:
        return any(path.name != "launch" for path in (tmp_path / "repository").iterdir())

    for _ in "a job", "a later job of the same number":
        assert slurm_ends(tmp_path, submitted, 4, 0, "--retries=2") and counted()
        assert slurm_ends(tmp_path, submitted, 137, 3, "--retries=2") and counted()
        assert not slurm_ends(tmp_path, submitted, 4, 6, "--retries=2") and not counted()
    assert slurm_ends(tmp_path, submitted, 4, 0) and counted()
    assert not slurm_ends(tmp_path, submitted, 0, 1) and not counted()  # finished
    for _ in "a job that is cancelled, and leaves its count", "a later one of the same number":
        assert slurm_ends(tmp_path, submitted, 4, 0, "--retries=1")
    assert "/.slurm-*.lost" in (ROOT / ".gitignore").read_text().splitlines()


def test_a_loss_that_cannot_be_counted_is_not_tried_again(tmp_path, submitted):
    """Else it would be for ever."""
    (tmp_path / "repository" / ".slurm-77.lost").mkdir()
    assert not slurm_ends(tmp_path, submitted, 4, 1)


@pytest.mark.slow
def test_slurm_trains_with_two_processes(tmp_path):
    """srun's stand-in starts two tasks with the variables that Slurm sets; they find each other and train."""
    stand_in(
        tmp_path,
        "srun",
        """
while [[ $1 == --* ]]; do shift; done
export SLURM_NTASKS=2 SLURM_STEP_NUM_TASKS=2 SLURM_STEP_NUM_NODES=2
export SLURM_STEP_NODELIST=localhost SLURM_LOCALID=0
for i in 0 1; do SLURM_PROCID=$i "$@" > "$LOGS/$i.log" 2>&1 & done
status=0; for job in $(jobs -p); do wait "$job" || status=$?; done; exit "$status" """,
    )
    environment = dict(
        SLURM_JOB_ID=str(os.getpid()),
        LOGS=str(tmp_path),
        JAX_PLATFORMS="cpu",
        JAX_NUM_CPU_DEVICES="2",
        XLA_FLAGS="",
    )
    environment |= dict(SLURM_SUBMIT_DIR=str(ROOT))
    training = [
        "--config=configs/upsampler256.py:debug",
        f"--workdir={tmp_path / 'run'}",
        "--config.num_steps=2",
    ]
    said = bash("slurm.sh", f"--python={sys.executable}", "--", *training, path=tmp_path, **environment)
    assert said.returncode == 0, (tmp_path / "0.log").read_text()
    assert "process 1 of 2, 2 of 4 devices" in (tmp_path / "1.log").read_text()
    assert (tmp_path / "run" / "checkpoints" / "2").exists()


# SkyPilot, Docker


def test_the_task_of_skypilot_is_whole():
    task = yaml.safe_load((PODS / "skypilot.yaml").read_text())
    assert unfit(task, SKYPILOT) == []
    assert unfit(task | {"numnodes": 1}, SKYPILOT) == [".numnodes is unknown"]
    program = task["run"].replace("bash launch/pods/job.sh bash launch/pods/host.sh", "printf '%s\\n'")
    environment = dict(
        SKYPILOT_NUM_NODES="1", TRAIN="--config=a '--config.data.path=/x y'", PATH=os.environ["PATH"]
    )
    said = subprocess.run(["bash", "-c", program], env=environment, capture_output=True, text=True)
    assert said.stdout.splitlines() == ["--", "--config=a", "--config.data.path=/x y"]
    several = environment | dict(
        SKYPILOT_NUM_NODES="2", SKYPILOT_NODE_IPS="10.0.0.1\n10.0.0.2", SKYPILOT_NODE_RANK="1"
    )
    shown = program.replace("exec printf '%s\\n' -- $TRAIN", "env")
    said = subprocess.run(["bash", "-c", shown], env=several, capture_output=True, text=True).stdout
    assert "JAX_COORDINATOR_ADDRESS=10.0.0.1:12355" in said and "JAX_PROCESS_ID=1" in said
    missing = subprocess.run(
        ["bash", "-c", task["run"]], env=environment | dict(TRAIN=""), capture_output=True
    )
    assert missing.returncode == 2


def test_skypilot_recovers_a_run_that_was_stopped_and_saved(tmp_path):
    task = yaml.safe_load((PODS / "skypilot.yaml").read_text())
    environment = installed(tmp_path, SAVING) | dict(SKYPILOT_NUM_NODES="1", TRAIN="--config=a --workdir=b")
    status, notes = stopped(["bash", "-c", task["run"]], tmp_path / "notes", **environment)
    assert notes == "ready\nsaved\n"
    assert status in task["resources"]["job_recovery"]["recover_on_exit_codes"]


@pytest.mark.parametrize("fails", [1, 2, 3, 4])
def test_skypilot_rents_nothing_again_for_a_run_that_fails(tmp_path, fails):
    """Exit codes to recover on are not counted, so that no failure of training may be among them."""
    task = yaml.safe_load((PODS / "skypilot.yaml").read_text())
    environment = installed(tmp_path, f"exit {fails}")
    environment |= dict(SKYPILOT_NUM_NODES="1", TRAIN="--config=a --workdir=b")
    said = subprocess.run(
        ["bash", "-c", task["run"]], cwd=ROOT, env=os.environ | environment, capture_output=True
    )
    recovery = task["resources"]["job_recovery"]
    assert said.returncode == fails and fails not in recovery["recover_on_exit_codes"]
    assert recovery["max_restarts_on_errors"] == 0


def test_the_images_hold_what_they_copy_and_install():
    lines = re.sub(r"\\\n", " ", (ROOT / "launch" / "Dockerfile").read_text()).splitlines()
    ignored = (ROOT / ".dockerignore").read_text().splitlines()
    assert ignored[0] == "*"
    for line in lines:
        if line.startswith("COPY"):
            *sources, _ = line.split()[1:]
            for source in sources:
                assert (ROOT / source).exists() and f"!{source}" in ignored, source
    extras = {
        extra for line in lines for found in re.findall(r"\.\[([\w,]+)\]", line) for extra in found.split(",")
    }
    text = (ROOT / "setup.py").read_text()
    assert extras == {"train", "eval", "cuda", "tpu"} and all(f'"{extra}": [' in text for extra in extras)
    starts = [line for line in lines if line.startswith("FROM")]
    assert [line.split()[-1] for line in starts] == ["base", "cpu", "cuda", "tpu"]
    assert re.fullmatch(r"FROM python:3\.13\.\d+-slim-\w+ AS base", starts[0])
    assert 'ENTRYPOINT ["python", "-m"]' in lines and lines.count("USER painter") == 2
