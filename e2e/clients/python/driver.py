"""kafka-python behind the drivers' line protocol (see e2e/doc.go)."""

import sys
import threading

from kafka import ConsumerRebalanceListener, KafkaConsumer, KafkaProducer


def say(line):
    sys.stdout.write(line + "\n")
    sys.stdout.flush()


def produce(bootstrap, topic, start, end):
    producer = KafkaProducer(bootstrap_servers=bootstrap)
    for i in range(int(start), int(end)):
        producer.send(topic, key=b"k%d" % i, value=b"v%d" % i)
    producer.flush()
    producer.close()
    say("produced %d" % (int(end) - int(start)))


class Show(ConsumerRebalanceListener):
    def on_partitions_revoked(self, revoked):
        pass

    def on_partitions_assigned(self, assigned):
        say(("assigned " + ",".join(str(tp.partition) for tp in sorted(assigned))).strip())


def consume(bootstrap, topic, group, flavour):
    more = {"group_instance_id": flavour[7:]} if flavour.startswith("static:") else {}
    consumer = KafkaConsumer(
        bootstrap_servers=bootstrap, group_id=group, enable_auto_commit=False, auto_offset_reset="earliest",
        session_timeout_ms=6000, heartbeat_interval_ms=500, metadata_max_age_ms=5000, **more)
    consumer.subscribe([topic], listener=Show())
    leave = threading.Event()
    threading.Thread(target=lambda: (sys.stdin.readline(), leave.set()), daemon=True).start()
    while not leave.is_set():
        # A join that a change of metadata began must end within one poll: kafka-python 3.0.12 forgets it otherwise,
        # whoever the coordinator is.
        batches = consumer.poll(timeout_ms=1000)
        for records in batches.values():
            for r in records:
                say("got %d %d %s" % (r.partition, r.offset, r.key.decode()))
        if batches:
            consumer.commit()
            say("committed")
    consumer.close()
    say("left")


if __name__ == "__main__":
    {"produce": produce, "consume": consume}[sys.argv[1]](*sys.argv[2:])
