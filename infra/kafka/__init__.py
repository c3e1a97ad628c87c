"""Kafka: producer, topics, record encoding and dead letters."""
