"""A reader as in training: processes that shuffle all files, open each with plain `open`, read it whole and compare its sum.

  training.py files FOLDER COUNT EPOCHS SEED     files below a folder, of any file system
  training.py s3 ENDPOINT COUNT EPOCHS SEED      the same objects by boto3, each process with a client of its own

Files are named d00000/f0000000 and so on, 1,000 to a folder, and end with the CRC-32 of what is before. One line of JSON: files/s of each epoch.
"""
import json, multiprocessing, os, random, sys, time, zlib

PROCESSES = 8


def name(i):
    return "d%05d/f%07d" % (i // 1000, i)


def read_files(folder):
    def read(i):
        with open(os.path.join(folder, name(i)), "rb") as f:
            return f.read()
    return read


def read_objects(endpoint):
    import boto3
    s3 = boto3.client("s3", endpoint_url=endpoint, region_name="us-east-1", aws_access_key_id="testkey", aws_secret_access_key="testsecret")
    return lambda i: s3.get_object(Bucket="bucket", Key=name(i))["Body"].read()


def work(kind, where, mine, out):
    read = {"files": read_files, "s3": read_objects}[kind](where)
    wrong = 0
    for i in mine:
        data = read(i)
        wrong += len(data) < 16 * 1024 or zlib.crc32(data[:-4]) != int.from_bytes(data[-4:], "little")
    out.put(wrong)


def main():
    kind, where, count, epochs, seed = sys.argv[1], sys.argv[2], int(sys.argv[3]), int(sys.argv[4]), int(sys.argv[5])
    rates = []
    for epoch in range(epochs):
        order = list(range(count))
        random.Random(seed + epoch).shuffle(order)
        out = multiprocessing.Queue()
        began = time.time()
        all = [multiprocessing.Process(target=work, args=(kind, where, order[p::PROCESSES], out)) for p in range(PROCESSES)]
        for p in all:
            p.start()
        wrong = sum(out.get() for _ in all)
        for p in all:
            p.join()
        assert wrong == 0, "%d files are not what they were" % wrong
        rates.append(round(count / (time.time() - began), 1))
    print(json.dumps(rates))


main()
