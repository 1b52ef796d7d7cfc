#!/usr/bin/env python3
"""archive.py OUT NAME:TAG SOURCE=TARGET... [--user UID:GID] [-- ENTRYPOINT ARG...]

Writes a docker archive (`docker load`, `ctr -n k8s.io images import`) of files and folders of this machine, without a registry, a daemon or a build tool. Symbolic
links in SOURCE are followed when SOURCE is a file that is there. Format: docker image spec v1.2, one layer; times and owners are fixed, so the same files are the same image."""
import hashlib, io, json, os, platform, sys, tarfile

args = sys.argv[1:]
entry = []
if "--" in args:
    entry = args[args.index("--") + 1:]
    args = args[:args.index("--")]
user = ""
if "--user" in args:
    i = args.index("--user")
    user = args[i + 1]
    del args[i:i + 2]
if len(args) < 3:
    sys.exit(__doc__)
out, ref, pairs = args[0], args[1], args[2:]


def plain(i):
    i.uid = i.gid = 0
    i.uname = i.gname = "root"
    i.mtime = 0
    return i


layer = out + ".layer"
with tarfile.open(layer, "w") as t:
    made = set()

    def folder(path, mode=0o755):
        path = path.strip("/")
        if not path or path in made:
            return
        folder(os.path.dirname(path))
        made.add(path)
        i = plain(tarfile.TarInfo(path))
        i.type, i.mode = tarfile.DIRTYPE, mode
        t.addfile(i)

    folder("tmp", 0o1777)
    folder("etc")
    for pair in pairs:
        source, target = pair.rsplit("=", 1)
        folder(os.path.dirname(target))
        # A link to what is not there is meant for where the image runs.
        if os.path.isdir(source) or (os.path.islink(source) and not os.path.exists(source)):
            t.add(source, arcname=target.strip("/"), filter=plain)
        else:
            t.add(os.path.realpath(source), arcname=target.strip("/"), filter=plain)
digest = hashlib.sha256()
with open(layer, "rb") as f:
    while chunk := f.read(1 << 20):
        digest.update(chunk)
arch = {"x86_64": "amd64", "aarch64": "arm64"}.get(platform.machine(), platform.machine())
config = json.dumps({
    "architecture": arch, "os": "linux",
    "config": {"Entrypoint": entry or None, "User": user, "WorkingDir": "/", "Env": ["PATH=/usr/local/bin:/usr/bin:/bin"]},
    "rootfs": {"type": "layers", "diff_ids": ["sha256:" + digest.hexdigest()]},
}).encode()
name = hashlib.sha256(config).hexdigest() + ".json"
with tarfile.open(out + ".new", "w") as t:
    def put(name, data):
        i = plain(tarfile.TarInfo(name))
        i.size = len(data)
        t.addfile(i, io.BytesIO(data))

    put(name, config)
    t.add(layer, arcname="layer.tar", filter=plain)
    put("manifest.json", json.dumps([{"Config": name, "RepoTags": [ref], "Layers": ["layer.tar"]}]).encode())
os.remove(layer)
os.replace(out + ".new", out)
