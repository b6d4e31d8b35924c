import base64
import hashlib
import re

from serve.routes.page import content_security_policy


def test_the_page_may_run_its_own_script_and_no_other(open_server):
    with open_server.client() as client:
        answer = client.get("/")
    assert answer.headers["content-type"].startswith("text/html")
    [script] = re.findall(r"<script type=\"module\">(.*?)</script>", answer.text, re.DOTALL)
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    assert f"script-src 'sha256-{digest}';" in answer.headers["content-security-policy"]


def test_a_page_without_scripts_may_run_none():
    assert "script-src 'none';" in content_security_policy("<!doctype html><p>nothing</p>")
