import io.atomix.storage.StorageLevel;
import io.atomix.storage.journal.Indexed;
import io.atomix.storage.journal.JournalReader;
import io.atomix.storage.journal.SegmentedJournal;
import io.atomix.utils.serializer.Namespace;
import java.io.IOException;
import java.nio.ByteBuffer;
import java.nio.channels.FileChannel;
import java.nio.charset.StandardCharsets;
import java.nio.file.Files;
import java.nio.file.Path;
import java.nio.file.StandardOpenOption;
import java.security.MessageDigest;
import java.security.NoSuchAlgorithmException;
import java.util.Arrays;
import java.util.Locale;
import java.util.Random;

/**
 * Appends to a Raft journal of Atomix, and acknowledges what is safe: mapped segments, for each commit
 * an msync, then an O_DSYNC write of 256 bytes with the last flushed index, as Zeebe's has it. Goes on
 * after the last whole record that Atomix finds. To verify opens the journal as to append does, which
 * brings the segments into order and adds no record.
 *
 * <pre>
 *     AtomixJournal append DIR ACKS SEED SEGMENT_MIB
 *     AtomixJournal verify DIR ACKS SEED SEGMENT_MIB
 * </pre>
 */
public final class AtomixJournal {
  private static final int[] GROUPS = {1, 1, 2, 4, 8};

  private final long seed;
  private final Path meta;
  private final SegmentedJournal<byte[]> journal;

  private AtomixJournal(Path directory, long seed, int segmentBytes) throws IOException {
    this.seed = seed;
    meta = directory.resolve("meta");
    Files.createDirectories(directory);
    journal = SegmentedJournal.<byte[]>builder()
        .withName("journal")
        .withDirectory(directory.toFile())
        .withStorageLevel(StorageLevel.MAPPED)
        .withNamespace(Namespace.builder().register(byte[].class).build())
        .withMaxSegmentSize(segmentBytes)
        .withMaxEntrySize(1 << 16)
        .build();
  }

  public static void main(String[] args) throws IOException {
    Path directory = Path.of(args[1]);
    Path acks = Path.of(args[2]);
    var journal = new AtomixJournal(directory, Long.parseLong(args[3]), Integer.parseInt(args[4]) << 20);
    if (args[0].equals("append")) {
      journal.append(acks);
    } else if (args[0].equals("verify")) {
      System.exit(journal.verify(acks) ? 0 : 1);
    } else {
      throw new IllegalArgumentException(args[0]);
    }
  }

  private void append(Path acks) throws IOException {
    var writer = journal.writer();
    try (var log = FileChannel.open(acks, StandardOpenOption.CREATE, StandardOpenOption.APPEND);
        var flushed = FileChannel.open(meta, StandardOpenOption.CREATE, StandardOpenOption.WRITE, StandardOpenOption.DSYNC)) {
      // Group commit: while one flush is under way, so many records arrive.
      var choose = new Random(seed + writer.getLastIndex());
      while (true) {
        long first = writer.getLastIndex() + 1;
        int count = GROUPS[choose.nextInt(GROUPS.length)];
        long begun = System.nanoTime();
        for (int i = 0; i < count; i++) {
          writer.append(body(first + i));
        }
        writer.flush();
        var last = ByteBuffer.allocate(256).putLong(0, first + count - 1);
        while (last.hasRemaining()) {
          flushed.write(last, last.position());
        }
        long now = System.nanoTime();
        // The clock is CLOCK_MONOTONIC. One write for a line, so that a crash leaves whole lines.
        var line = String.format(Locale.ROOT, "%.6f %d %d %.3f%n", now / 1e9, first, count, (now - begun) / 1e6);
        log.write(ByteBuffer.wrap(line.getBytes(StandardCharsets.US_ASCII)));
      }
    }
  }

  private boolean verify(Path acks) throws IOException {
    long acknowledged = 0;
    for (String line : Files.exists(acks) ? Files.readAllLines(acks) : Arrays.<String>asList()) {
      String[] words = line.split(" ");
      acknowledged = Math.max(acknowledged, Long.parseLong(words[1]) + Long.parseLong(words[2]) - 1);
    }
    long readable = 0;
    try (JournalReader<byte[]> reader = journal.openReader(1)) {
      while (reader.hasNext()) {
        Indexed<byte[]> entry = reader.next();
        if (entry.index() != readable + 1 || !Arrays.equals(entry.entry(), body(entry.index()))) {
          System.out.println("record " + entry.index() + " after " + readable + " is another than was written");
          return false;
        }
        readable = entry.index();
      }
    }
    byte[] bytes = Files.exists(meta) ? Files.readAllBytes(meta) : new byte[0];
    long flushed = bytes.length < Long.BYTES ? 0 : ByteBuffer.wrap(bytes).getLong();
    System.out.printf(Locale.ROOT, "acknowledged up to %d, readable up to %d, the meta store says %d%n", acknowledged, readable, flushed);
    return readable >= acknowledged && readable >= flushed && flushed >= acknowledged;
  }

  /** The record of an index: 200 to 1800 bytes, like a batch of Zeebe's records, and told by its index alone. */
  private byte[] body(long index) {
    try {
      byte[] digest = MessageDigest.getInstance("SHA-256").digest(ByteBuffer.allocate(16).putLong(seed).putLong(index).array());
      byte[] body = new byte[200 + Byte.toUnsignedInt(digest[0]) * 6 + Byte.toUnsignedInt(digest[1]) % 71];
      for (int at = 0; at < body.length; at += digest.length) {
        System.arraycopy(digest, 0, body, at, Math.min(digest.length, body.length - at));
      }
      return body;
    } catch (NoSuchAlgorithmException error) {
      throw new AssertionError("every JVM has SHA-256", error);
    }
  }
}
