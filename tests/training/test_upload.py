"""A saved run goes to a hub as it is: huggingface_hub's own client uploads it to a server that answers as the Hub does."""
import base64
import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
import yaml
from conftest import tiny_vit

import vitplast as vp


class Hub(BaseHTTPRequestHandler):
    "The four calls of create_repo and upload_folder; every file goes inline, as small text does on the Hub."

    def do_POST(self):
        body = self.rfile.read(int(self.headers["Content-Length"]))
        self.server.asked.append(self.path)
        if self.path == "/api/repos/create":
            asked = json.loads(body)
            return self.answer({"url": f"{self.server.place}/{asked['organization']}/{asked['name']}"})
        if self.path == "/api/validate-yaml":
            return self.answer(*self.validated(json.loads(body)["content"]))
        if self.path == "/api/models/me/run/preupload/main":
            files = [{"path": f["path"], "uploadMode": "regular", "shouldIgnore": False} for f in json.loads(body)["files"]]
            return self.answer({"files": files})
        if self.path == "/api/models/me/run/commit/main":
            for line in map(json.loads, body.splitlines()):
                if line["key"] == "file":
                    self.server.files[line["value"]["path"]] = base64.b64decode(line["value"]["content"])
            oid = "0" * 40
            return self.answer({"success": True, "commitOid": oid, "commitUrl": f"{self.server.place}/me/run/commit/{oid}"})
        self.answer({"error": "not found"}, 404)

    def validated(self, card):
        "As the Hub: what lies between the first two lines of dashes is YAML, a mapping."
        try:
            top = yaml.safe_load(card.split("---\n")[1]) if card.startswith("---\n") else None
            assert isinstance(top, dict), "no metadata"
        except (yaml.YAMLError, IndexError, AssertionError) as error:
            return {"errors": [{"message": str(error)}], "warnings": []}, 400
        return {"errors": [], "warnings": []}, 200

    def answer(self, found, status=200):
        text = json.dumps(found).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(text)))
        self.end_headers()
        self.wfile.write(text)

    def log_message(self, *_):
        pass


@pytest.fixture
def hub():
    server = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    server.place, server.files, server.asked = f"http://127.0.0.1:{server.server_port}", {}, []
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    yield server
    server.shutdown()
    thread.join()
    server.server_close()


@pytest.fixture
def folder(stripes, tmp_path):
    model = tiny_vit(num_classes=3)
    model.pretrained_cfg = {"mean": (0.5,) * 3, "std": (0.25,) * 3}
    run = vp.finetune(model, stripes, "LN1", vp.FinetuneConfig(steps=2, eval_every=2, batch_size=8))
    return run.save(tmp_path / "run"), model


@pytest.fixture
def api(hub, monkeypatch):
    "The client, which elsewhere in the tests is kept off the network."
    from huggingface_hub import HfApi, constants

    for name in ("HF_HUB_OFFLINE", "_HF_HUB_OFFLINE"):
        if hasattr(constants, name):
            monkeypatch.setattr(constants, name, False)
    return HfApi(endpoint=hub.place, token="hf_of_a_test")


def test_a_saved_run_is_uploaded_as_it_is_and_loads_from_what_arrived(api, hub, folder, tmp_path):
    folder, model = folder
    api.create_repo("me/run")
    api.upload_folder(repo_id="me/run", folder_path=folder)
    assert hub.files == {p.name: p.read_bytes() for p in folder.iterdir()} and set(hub.files) == {"run.json", "trained.safetensors", "README.md"}
    assert [p.rsplit("/", 1)[0] for p in hub.asked if "models" in p] == ["/api/models/me/run/preupload", "/api/models/me/run/commit"]
    assert "/api/validate-yaml" in hub.asked
    (tmp_path / "arrived").mkdir()
    for name, data in hub.files.items():
        (tmp_path / "arrived" / name).write_bytes(data)
    assert vp.load_run(tmp_path / "arrived", model).components == "LN1"


def test_a_card_that_is_no_card_is_refused_by_this_hub(api, folder):
    folder, _ = folder
    (folder / "README.md").write_text("---\ntags: [\n---\n")
    with pytest.raises(ValueError, match="Invalid metadata in README.md"):
        api.upload_folder(repo_id="me/run", folder_path=folder)


def test_the_card_is_read_by_the_library_of_the_hub(folder):
    from huggingface_hub import ModelCard

    folder, _ = folder
    card = ModelCard.load(folder / "README.md")
    assert card.data.library_name == "vitplast" and card.data.pipeline_tag == "image-classification"
    assert card.data.tags == ["vision-transformer", "partial-finetuning"] and card.data.license is None
    assert card.text.strip().startswith("# ") and "vp.load_run" in card.text
    assert yaml.safe_load(str(card.data)) == yaml.safe_load((folder / "README.md").read_text().split("---\n")[1])


def test_names_of_people_do_not_break_the_card(stripes, folder, tmp_path):
    "Classes and tasks may be called anything; the metadata is ours alone."
    from dataclasses import replace

    from huggingface_hub import ModelCard

    _, model = folder
    task = replace(stripes, name="a: [b\n---\n", classes=("---", "x: {y"))
    run = vp.finetune(model, task, "LN1", vp.FinetuneConfig(steps=1, eval_every=1, batch_size=8))
    card = ModelCard.load(run.save(tmp_path / "odd") / "README.md")
    assert card.data.tags == ["vision-transformer", "partial-finetuning"] and "x: {y" in card.text
