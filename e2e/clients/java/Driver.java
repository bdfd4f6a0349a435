import java.time.Duration;
import java.util.Collection;
import java.util.HashMap;
import java.util.List;
import java.util.Map;
import java.util.Properties;
import java.util.concurrent.CountDownLatch;
import java.util.concurrent.atomic.AtomicBoolean;
import java.util.stream.Collectors;
import org.apache.kafka.clients.consumer.ConsumerRebalanceListener;
import org.apache.kafka.clients.consumer.ConsumerRecord;
import org.apache.kafka.clients.consumer.ConsumerRecords;
import org.apache.kafka.clients.consumer.KafkaConsumer;
import org.apache.kafka.clients.consumer.OffsetAndMetadata;
import org.apache.kafka.clients.producer.KafkaProducer;
import org.apache.kafka.clients.producer.ProducerRecord;
import org.apache.kafka.common.KafkaException;
import org.apache.kafka.common.TopicPartition;
import org.apache.kafka.common.errors.RebalanceInProgressException;
import org.apache.kafka.common.serialization.StringDeserializer;
import org.apache.kafka.common.serialization.StringSerializer;

/** The Java client behind the drivers' line protocol (see e2e/doc.go). */
public class Driver {
  static synchronized void say(String line) {
    System.out.println(line);
    System.out.flush();
  }

  public static void main(String[] args) throws Exception {
    switch (args[0]) {
      case "produce": produce(args[1], args[2], Integer.parseInt(args[3]), Integer.parseInt(args[4])); break;
      case "consume": consume(args[1], args[2], args[3], args[4]); break;
      case "transact": transact(args[1], args[2], args[3]); break;
      default: throw new IllegalArgumentException(args[0]);
    }
  }

  static Properties client(String bootstrap) {
    Properties p = new Properties();
    p.put("bootstrap.servers", bootstrap);
    p.put("key.serializer", StringSerializer.class.getName());
    p.put("value.serializer", StringSerializer.class.getName());
    p.put("key.deserializer", StringDeserializer.class.getName());
    p.put("value.deserializer", StringDeserializer.class.getName());
    p.put("metadata.max.age.ms", "5000");
    return p;
  }

  static void produce(String bootstrap, String topic, int from, int to) throws Exception {
    try (KafkaProducer<String, String> producer = new KafkaProducer<>(client(bootstrap))) {
      for (int i = from; i < to; i++) producer.send(new ProducerRecord<>(topic, "k" + i, "v" + i));
      producer.flush();
    }
    say("produced " + (to - from));
  }

  static void consume(String bootstrap, String topic, String group, String flavour) throws Exception {
    Properties p = client(bootstrap);
    p.put("group.id", group);
    p.put("group.protocol", "classic");
    p.put("enable.auto.commit", "false");
    p.put("auto.offset.reset", "earliest");
    p.put("session.timeout.ms", "6000");
    p.put("heartbeat.interval.ms", "500");
    if (flavour.startsWith("static:")) p.put("group.instance.id", flavour.substring(7));
    p.put("partition.assignment.strategy", flavour.equals("cooperative")
        ? "org.apache.kafka.clients.consumer.CooperativeStickyAssignor"
        : "org.apache.kafka.clients.consumer.RangeAssignor");
    AtomicBoolean leave = new AtomicBoolean();
    Thread stdin = new Thread(() -> {
      try { while (System.in.read() != -1 && !leave.get()) leave.set(true); } catch (Exception e) { /* ends below */ }
      leave.set(true);
    });
    stdin.setDaemon(true);
    stdin.start();
    try (KafkaConsumer<String, String> consumer = new KafkaConsumer<>(p)) {
      consumer.subscribe(List.of(topic), new ConsumerRebalanceListener() {
        // Cooperative members are told only of what is new: show the whole.
        public void onPartitionsAssigned(Collection<TopicPartition> ps) { show(consumer); }
        public void onPartitionsRevoked(Collection<TopicPartition> ps) { }
      });
      boolean owed = false;
      while (!leave.get()) {
        ConsumerRecords<String, String> records = consumer.poll(Duration.ofMillis(100));
        for (ConsumerRecord<String, String> r : records) say("got " + r.partition() + " " + r.offset() + " " + r.key());
        owed |= !records.isEmpty();
        if (!owed) continue;
        try {
          consumer.commitSync();
        } catch (RebalanceInProgressException e) {
          // With no broker to be reached the client forgets all metadata (KIP-899), and joins again if it finds its
          // coordinator sooner than its topics; a cooperative member has records meanwhile. poll goes on with it.
          continue;
        }
        owed = false;
        say("committed");
      }
    }
    say("left");
    System.exit(0);
  }

  static void show(KafkaConsumer<String, String> consumer) {
    say(("assigned " + consumer.assignment().stream().map(tp -> "" + tp.partition()).sorted().collect(Collectors.joining(","))).trim());
  }

  /** A transaction without offsets, then one with them, which must fail and leave nobody else harmed. */
  static void transact(String bootstrap, String topic, String group) throws Exception {
    Properties p = client(bootstrap);
    p.put("transactional.id", "java-" + topic);
    p.put("enable.idempotence", "true");
    try (KafkaProducer<String, String> producer = new KafkaProducer<>(p)) {
      producer.initTransactions();
      for (String end : List.of("commit", "abort")) {
        producer.beginTransaction();
        for (int i = 0; i < 10; i++) producer.send(new ProducerRecord<>(topic, end + i, end));
        producer.flush();
        if (end.equals("commit")) producer.commitTransaction(); else producer.abortTransaction();
        say(end + " ended");
      }
      p.put("group.id", group);
      p.put("group.protocol", "classic");
      p.put("auto.offset.reset", "earliest");
      p.put("isolation.level", "read_committed");
      try (KafkaConsumer<String, String> consumer = new KafkaConsumer<>(p)) {
        consumer.subscribe(List.of(topic));
        int n = 0;
        while (n < 10) for (ConsumerRecord<String, String> r : consumer.poll(Duration.ofMillis(100))) { n++; say("got " + r.partition() + " " + r.offset() + " " + r.key()); }
        producer.beginTransaction();
        producer.send(new ProducerRecord<>(topic, "lost", "lost"));
        Map<TopicPartition, OffsetAndMetadata> offsets = new HashMap<>();
        offsets.put(new TopicPartition(topic, 0), new OffsetAndMetadata(1));
        try {
          producer.sendOffsetsToTransaction(offsets, consumer.groupMetadata());
          producer.commitTransaction();
          say("offsets accepted");
        } catch (KafkaException e) {
          say("offsets " + e.getClass().getSimpleName() + ": " + e.getMessage());
        }
        try {
          producer.abortTransaction();
          say("still usable");
        } catch (KafkaException e) {
          say("fatal " + e.getClass().getSimpleName());
        }
      }
    }
  }
}
