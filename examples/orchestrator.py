"""An orchestrator in a page: wakes a pool of VMs from one snapshot, and puts one back to sleep.

    python3 orchestrator.py SOCKET SNAPSHOT NAME...

Plain HTTP over the daemon's unix socket; nothing but the standard library.
"""

import http.client
import json
import socket
import sys


class Daemon(http.client.HTTPConnection):
    """A connection to the daemon."""

    def __init__(self, path):
        super().__init__("dormouse")
        self.path = path

    def connect(self):
        self.sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self.sock.connect(self.path)

    def ask(self, method, path, body=None):
        """What an answer has, or an error with what the daemon says of it."""
        headers = {"content-type": "application/json"} if body is not None else {}
        data = json.dumps(body) if body is not None else None
        self.request(method, path, data, headers)
        answer = self.getresponse()
        value = json.loads(answer.read())
        if answer.status >= 400:
            error = value["error"]
            raise RuntimeError(": ".join([error["message"], *error["causes"]]))
        return value


def events(path, job):
    """What happens to a job, as it happens."""
    daemon = Daemon(path)
    daemon.request("GET", f"/v1/jobs/{job}/events")
    for line in daemon.getresponse():
        if line.startswith(b"data: "):
            yield json.loads(line[6:])
    daemon.close()


def main(path, snapshot, *names):
    daemon = Daemon(path)
    # A fork is long work: the answer is a job, and its events say how far it is.
    job = daemon.ask("POST", f"/v1/snapshots/{snapshot}/fork", {"names": names})
    awake = 0
    for job in events(path, job["id"]):
        for vm in job["awake"][awake:]:
            awake += 1
            print(f"{vm['name']}: awake after {vm['seconds']['total'] * 1e3:.0f} ms, pid {vm['pid']}")
    if job["state"] != "done":
        raise SystemExit(f"the fork {job['state']}: {job['error']['message']}")

    # The first sleeps: it is waited for until its guest stands still no longer, the rest is a job.
    frozen = daemon.ask("POST", f"/v1/vms/{names[0]}/sleep?wait=frozen", {"as": names[0]})
    print(f"{names[0]}: frozen for {frozen['frozen_seconds'] * 1e3:.0f} ms")
    # The others end.
    for name in names[1:]:
        daemon.ask("DELETE", f"/v1/vms/{name}?wait=durable")
        print(f"{name}: gone")
    for job in events(path, frozen["job"]):
        pass
    if job["state"] != "done":
        raise SystemExit(f"the sleep {job['state']}: {job['error']['message']}")
    left = [vm["name"] for vm in daemon.ask("GET", "/v1/vms")["vms"] if vm["name"] in names]
    print(f"left: {left}; stored: {job['result']['snapshot']}")


if __name__ == "__main__":
    main(*sys.argv[1:])
