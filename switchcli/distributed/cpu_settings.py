"""Settings of this process on a CPU: the number of its threads, and what happens to memory that it frees."""

import ctypes
import os
import platform

import torch

from switchcli.system.processor import available_processors, is_thread_count_set

M_TRIM_THRESHOLD, M_MMAP_MAX = -1, -4  # glibc, malloc.h


def limit_threads() -> None:
    """Have torch use no more threads than this rank's share of the processors, unless OMP_NUM_THREADS sets the number.

    OpenMP does not know the limit of a container. More threads than the limit has processors slow a run down: while
    they wait for one another, they spend what the container may use. The number holds for the whole process.
    """
    ranks = os.environ.get("LOCAL_WORLD_SIZE", "")
    num_ranks = int(ranks) if ranks.isdecimal() else 1  # on this machine
    share = max(1, available_processors() // max(1, num_ranks))
    if not is_thread_count_set() and share < torch.get_num_threads():
        torch.set_num_threads(share)


def keep_freed_memory() -> None:
    """Have glibc keep the memory that tensors free for the next ones. With other C libraries nothing changes.

    By default glibc gives each large tensor fresh pages and returns them afterwards. The kernel must clear fresh pages,
    which takes longer than computing the tensor. The price is fragmentation: freed pieces that no later tensor fits
    into stay with the process.
    """
    if platform.libc_ver()[0] == "glibc":
        libc = ctypes.CDLL(None)
        libc.mallopt(M_MMAP_MAX, 0)
        libc.mallopt(M_TRIM_THRESHOLD, -1)  # never trim; the largest number, 2**31 - 1, is less than a step frees
