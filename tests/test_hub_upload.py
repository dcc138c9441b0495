import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from huggingface_hub.errors import HfHubHTTPError, HTTPError
from train_cases import ROWS, train_small

from gistfast.errors import ConfigError
from gistfast.training.hub_upload import HubUpload, check_hub


class FakeHub:
    """Takes uploads, or fails as it is told."""

    def __init__(self, *failures: Exception) -> None:
        self.failures = list(failures)
        self.made: list[tuple[str, bool]] = []
        self.tried: list[str] = []
        self.uploaded: list[str] = []
        self.open = threading.Event()
        self.open.set()
        self.options: dict[str, Any] = {}

    def create_repo(self, repo: str, *, private: bool, exist_ok: bool) -> None:
        assert exist_ok
        self.made.append((repo, private))

    def upload_folder(self, **options: Any) -> None:
        self.tried.append(options["commit_message"])
        assert self.open.wait(30)
        if self.failures:
            raise self.failures.pop(0)
        self.options = options
        self.uploaded.append(options["commit_message"])


def upload_to(hub: FakeHub) -> HubUpload:
    return HubUpload(hub, "me/student", first_wait_s=0.01)


def wait_for_a_try(hub: FakeHub) -> None:
    for _ in range(3000):
        if hub.tried:
            return
        threading.Event().wait(0.01)
    pytest.fail("nothing was tried")


def test_folder_is_uploaded_to_a_private_repository(tmp_path: Path) -> None:
    hub = FakeHub()
    upload = upload_to(hub)
    upload.offer(tmp_path, "step 1")
    assert upload.finish(30)
    assert hub.made == [("me/student", True)]
    assert (hub.options["repo_id"], hub.options["folder_path"]) == ("me/student", str(tmp_path))


@pytest.mark.parametrize(
    "failure", [ConnectionError("no route"), ValueError("bad"), HTTPError("slow"), RuntimeError("storage")], ids=repr
)
def test_failure_is_logged_and_tried_again(
    failure: Exception, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    assert issubclass(HfHubHTTPError, HTTPError)
    hub = FakeHub(failure, failure)
    upload = upload_to(hub)
    with caplog.at_level("WARNING", "gistfast"):
        upload.offer(tmp_path, "step 1")
        assert upload.finish(30)
    assert hub.tried == ["step 1"] * 3
    assert hub.uploaded == ["step 1"]
    assert caplog.text.count(f"upload to me/student failed ({failure})") == 2


def test_latest_of_those_that_wait_is_uploaded(tmp_path: Path) -> None:
    hub = FakeHub()
    hub.open.clear()
    upload = upload_to(hub)
    upload.offer(tmp_path, "step 1")
    wait_for_a_try(hub)
    upload.offer(tmp_path, "step 2")
    upload.offer(tmp_path, "step 3")
    hub.open.set()
    assert upload.finish(30)
    assert hub.uploaded == ["step 1", "step 3"]


def test_end_waits_for_a_while_and_not_longer(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    hub = FakeHub()
    hub.open.clear()
    upload = upload_to(hub)
    upload.offer(tmp_path, "step 1")
    with caplog.at_level("WARNING", "gistfast"):
        assert not upload.finish(0.05)
    assert "me/student has not got all of the run" in caplog.text
    hub.open.set()
    assert upload.finish(30)


def test_end_does_not_wait_for_the_next_try(tmp_path: Path) -> None:
    hub = FakeHub(ConnectionError("no route"))
    upload = HubUpload(hub, "me/student", first_wait_s=1000)
    upload.offer(tmp_path, "step 1")
    wait_for_a_try(hub)
    # The failure is noted under the same lock that the next offer takes.
    upload.offer(tmp_path, "step 2")
    assert upload.finish(30)
    assert hub.uploaded[-1] == "step 2"


def test_folder_that_is_gone_is_not_tried_again(tmp_path: Path) -> None:
    hub = FakeHub(ValueError("is not a directory"))
    upload = upload_to(hub)
    upload.offer(tmp_path / "checkpoint-1", "step 1")
    assert upload.finish(30)
    assert (hub.tried, hub.uploaded) == (["step 1"], [])


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> FakeHub:
    fake = FakeHub()
    monkeypatch.setattr("gistfast.training.hub_upload.HfApi", lambda: fake)
    monkeypatch.setattr("gistfast.training.hub_upload.get_token", lambda: "a token")
    return fake


def test_run_uploads_checkpoints_and_student_but_nothing_of_this_machine(
    hub: FakeHub, make_store: Callable[..., Any], tiny_student: Path, tmp_path: Path
) -> None:
    report = train_small(
        store=make_store(ROWS).path, student=tiny_student, out=tmp_path / "out", push_to_hub="me/student", save_steps=3
    )
    assert hub.uploaded[-1] == "trained student, 6 steps"
    assert set(hub.uploaded) <= {"step 3", "step 6", "trained student, 6 steps"}
    assert hub.options["folder_path"] == str(report.path)
    assert {"gistfast.json", "report.json", "checkpoints/*", "trainer_state.json"} <= set(
        hub.options["ignore_patterns"]
    )


def test_run_ends_whatever_the_hub_does(
    hub: FakeHub, make_store: Callable[..., Any], tiny_student: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("gistfast.training.hub_upload._LAST_WAIT_S", 0.05)
    hub.failures = [ConnectionError("no route")] * 1000
    options = {"store": make_store(ROWS).path, "student": tiny_student, "push_to_hub": "me/student"}
    assert train_small(**options, out=tmp_path / "out", save_steps=2).steps == 6
    assert hub.uploaded == []
    # The thread is let go.
    hub.failures.clear()


def test_upload_that_cannot_be_is_refused_at_once(hub: FakeHub, monkeypatch: pytest.MonkeyPatch) -> None:
    check_hub("me/student")
    with pytest.raises(ConfigError, match="--push-to-hub a/b/c is no name of a repository"):
        check_hub("a/b/c")
    monkeypatch.setattr("gistfast.training.hub_upload.get_token", lambda: None)
    with pytest.raises(ConfigError, match="not logged in: run `hf auth login`"):
        check_hub("me/student")
