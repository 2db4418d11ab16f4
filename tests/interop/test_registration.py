"""Registration heals itself: whatever kubelet or a person does to the socket, it comes back."""

import shutil

import pytest

from harness import eventually, is_socket


@pytest.fixture
def registered(node, kubelet):
    node.add_runtime()
    node.start()
    kubelet.register()
    return node


def inode(path):
    return path.stat().st_ino


def test_a_deleted_socket_comes_back(registered, kubelet):
    registered.registration_socket.unlink()
    eventually(lambda: is_socket(registered.registration_socket), 5, "the socket is there again")
    kubelet.register()


def test_a_wiped_directory_is_filled_again(registered, kubelet):
    # kubelet empties its plugins_registry at start (cleanup of the plugin manager).
    for entry in registered.registry.iterdir():
        entry.unlink()
    eventually(lambda: is_socket(registered.registration_socket), 5, "the socket is there again")
    kubelet.register()


def test_a_directory_that_is_made_anew_is_filled_again(registered, kubelet):
    # The agent may put its socket back while the directory is being emptied.
    eventually(lambda: shutil.rmtree(registered.registry, ignore_errors=True) or True)
    registered.registry.mkdir(exist_ok=True)
    eventually(lambda: is_socket(registered.registration_socket), 10, "the socket is there again")
    kubelet.register()


def test_a_restarted_kubelet_registers_again_on_the_same_socket(registered, kubelet):
    before = inode(registered.registration_socket)
    for _ in range(3):
        kubelet.register()
    assert inode(registered.registration_socket) == before


def test_a_negative_status_makes_a_new_socket(registered, kubelet):
    # Before kubernetes#133335 kubelet never tries again on the same socket.
    before = inode(registered.registration_socket)
    kubelet.register(accept=False, error="failed to update CSINode")
    registered.wait_log("failed to update CSINode")
    eventually(
        lambda: is_socket(registered.registration_socket) and inode(registered.registration_socket) != before,
        15, "a new socket",
    )
    kubelet.register()


def test_the_socket_appears_when_the_csi_socket_answers_and_goes_with_the_agent(node, kubelet):
    node.add_runtime()
    node.start(wait=False)
    eventually(lambda: is_socket(node.registration_socket))
    kubelet.register()  # calls NodeGetInfo at once
    node.stop()
    assert not node.registration_socket.exists()


def test_a_killed_node_role_keeps_the_registration_socket(registered, kubelet):
    import os
    import signal

    before = inode(registered.registration_socket)
    os.kill(registered.node_pid(), signal.SIGKILL)
    kubelet.register()  # waits in the backlog until the next node role serves it
    assert inode(registered.registration_socket) == before


def test_registration_can_be_turned_off(node):
    node.add_runtime()
    node.start(registration_dir="none")
    assert list(node.registry.iterdir()) == []
