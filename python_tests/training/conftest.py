import pytest
import torch


@pytest.fixture(autouse=True, scope="module")
def one_thread():
    """Threads that wait for each other are slow where other processes keep the cores busy."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)
