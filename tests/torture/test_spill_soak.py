"""Short soaks of a store that is too small."""

from __future__ import annotations

import os
import subprocess

import pytest
from short_form import figures_of

WORK = ("--times", "4", "--processes", "8")


def test_a_working_set_of_four_times_the_memory_is_served(tmp_path):
    figures = figures_of("spill_soak.py", tmp_path, "--seconds", "6", *WORK)
    assert figures["store: written"] > 0 and figures["store: restores"] > 0
    assert figures["MiB verified"] > 4 * figures["limit MiB"]


def test_deaths_of_clients_and_service_lose_nothing(tmp_path):
    figures = figures_of("spill_soak.py", tmp_path, "--seconds", "8", "--kill", *WORK)
    assert figures["SIGKILLs of clients"] > 0 and figures["SIGKILLs of services"] > 0
    assert figures["files left for the next start"] > 0  # or its sweep shows nothing


def test_a_full_disk_hurts_only_those_who_need_it(tmp_path):
    refused = why_no_mount()
    if refused:
        pytest.skip(f"--disk-full mounts a file system: {refused}")
    figures = figures_of("spill_soak.py", tmp_path, "--seconds", "14", "--disk-full", *WORK)
    assert figures["times that the disk was full"] == 1
    assert figures["errors while the disk was full"] > 0


def why_no_mount() -> str:
    """What this machine or container answers, or nothing."""
    if os.geteuid() != 0:
        return "that takes root"
    script = "set -e; d=$(mktemp -d); truncate -s 8M $d/i; mkfs.ext4 -q $d/i; mount -o loop $d/i $d; umount $d; rm -r $d"
    command = ["unshare", "--mount", "bash", "-c", script]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    return done.stderr.strip() or f"exit status {done.returncode}" if done.returncode else ""
