"""Which users may read a file that holds a secret."""

import os
import stat

import pytest

from kvbelt.security.keys import others_may_read


def file_of(owner, mode):
    """The status of a file with this owner and mode."""
    return os.stat_result((stat.S_IFREG | mode, 0, 0, 1, owner, 10001, 0, 0, 0, 0))


@pytest.mark.parametrize("mode", [0o400, 0o600])
def test_a_file_of_its_owners_alone_is_fine(mode):
    """The owner may be root or any user."""
    assert not others_may_read(file_of(1000, mode), user=1000)
    assert not others_may_read(file_of(0, mode), user=0)


def test_a_file_of_roots_may_be_read_by_a_group():
    """Kubernetes mounts a Secret so for a process that is not root."""
    assert not others_may_read(file_of(0, 0o440), user=10001)
    assert others_may_read(file_of(0, 0o440), user=0)
    assert others_may_read(file_of(1000, 0o440), user=1000)


@pytest.mark.parametrize("mode", [0o460, 0o444, 0o404, 0o450])
def test_other_modes_are_refused(mode):
    """The group may only read, and other users nothing."""
    assert others_may_read(file_of(0, mode), user=10001)
